"""Which blocks to cut: the ways to choose them, by what is left of the teacher before and after reconstruction.

    python benchmarks/cuts.py --teacher FOLDER --text FILE [--methods importance kl] [--reconstruct linear]

For each way of choosing, `coldstill prune` makes the student plainly cut and reconstructed, in a process of its own,
and KL(teacher || student) over held-out rows of the same text judges both. Prints one JSON object a student: the blocks
that went, what choosing and cutting took, and the KL in nats a token, row by row too, so that ways can be compared in
pairs.

Without --teacher, or the variable SMOLLM2, the teacher of `coldstill demo` and the built-in corpus stand in.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from recovery import teacher_and_source, timed
from torch import Tensor

from coldstill.pipeline.models import ModelParts, load_model, load_tokenizer, take_apart
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.rows.building import build_rows


def main() -> None:
    options = parse()
    options.workdir.mkdir(parents=True, exist_ok=True)
    teacher_folder, source = teacher_and_source(options)
    judge: Judge | None = None
    for method in options.methods:
        for reconstruct in (False, options.reconstruct):
            path = write_recipe(
                options, teacher_folder, source, {"remove": options.remove, "method": method}, reconstruct
            )
            judge = judge or Judge(path, teacher_folder)
            made = timed("prune", path)
            report = made["summary"]["report"]
            removed = sorted(set(range(report["blocks"]["teacher"])) - set(report["blocks"]["kept"]))
            found = {"removed": removed, "seconds": made["summary"]["seconds"], "peak_gb": made["peak_gb"]}
            found |= judge(made["summary"]["folder"])
            print(json.dumps({"method": method, "reconstruct": reconstruct, **found}), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=os.environ.get("SMOLLM2"), help="the teacher's folder or hub name")
    parser.add_argument("--text", help="a text file; its first rows judge, the next ones calibrate")
    parser.add_argument("--methods", nargs="+", default=["importance", "kl"])
    parser.add_argument("--reconstruct", choices=["linear", "blocks"], default="linear")
    parser.add_argument("--remove", type=int, default=4)
    parser.add_argument("--calibration-rows", type=int, default=16)
    parser.add_argument("--eval-rows", type=int, default=8)
    parser.add_argument("--workdir", type=Path, default=Path("runs/cuts"))
    return parser.parse_args()


def write_recipe(
    options: argparse.Namespace, teacher: str, source: dict[str, Any], layers: dict[str, Any], reconstruct: bool | str
) -> Path:
    prune = {"layers": layers, "reconstruct": reconstruct, "calibration_rows": options.calibration_rows}
    recipe = {
        "output": str(options.workdir / "run"),
        "cache": str(options.workdir / "caches"),
        "teacher": {"path": teacher, "dtype": "float32"},
        "data": {
            "sequence_length": 512 if options.teacher else 256,
            # What students are compared on, as they are made, stands behind what they are made by.
            "train": {**source, "max_rows": options.calibration_rows + 2},
            "eval": {**source, "max_rows": options.eval_rows},
        },
        "student": {"prune": prune},
    }
    path = options.workdir / f"{layers['method']}-{reconstruct}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


class Judge:
    """The teacher's last states over held-out rows, and what students make of the same rows."""

    def __init__(self, recipe: Path, teacher: str) -> None:
        _, held_out = build_rows(load_recipe(recipe).data, load_tokenizer(Path(teacher)))
        self._rows = [torch.from_numpy(tokens.astype("int64")) for tokens in held_out.tokens]
        self._teacher = take_apart(load_model(Path(teacher), dtype=torch.float32))
        self._states = [last_state(self._teacher, row) for row in self._rows]

    def __call__(self, folder: str) -> dict[str, Any]:
        student = take_apart(load_model(Path(folder), dtype=torch.float32))
        kl = [self._kl(student, row, state_TD) for row, state_TD in zip(self._rows, self._states, strict=True)]
        return {"kl": round(sum(kl) / len(kl), 4), "by_row": [round(value, 4) for value in kl]}

    @torch.inference_mode()
    def _kl(self, student: ModelParts, row: Tensor, state_TD: Tensor) -> float:
        total, own_TD = 0.0, last_state(student, row)
        for chunk in self._teacher.output_head.chunks(len(row)):
            log_p = self._teacher.output_head(state_TD[chunk]).log_softmax(dim=-1)
            log_q = student.output_head(own_TD[chunk]).log_softmax(dim=-1)
            total += float((log_p.exp() * (log_p - log_q)).sum())
        return total / len(row)


@torch.inference_mode()
def last_state(parts: ModelParts, row: Tensor) -> Tensor:
    return parts.body(input_ids=row.unsqueeze(0), use_cache=False).last_hidden_state[0]


if __name__ == "__main__":
    main()
