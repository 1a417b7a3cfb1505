"""How faithful each kind of logits target is, at what size: against live distillation of a real pruned student.

    python benchmarks/fidelity.py --teacher FOLDER --calibrate FILE [--measure NAME=FILE ...] [--rows 8]
    python benchmarks/fidelity.py --plot runs/fidelity/fidelity.jsonl docs/fidelity.svg

The teacher loses four decoder blocks by importance. Transform codes are fitted to rows of the first text; every kind is
stored, through `coldstill precompute`, for other rows of it and for rows of each other text, and read back from disk.
Prints one JSON object a line: kind, setting, temperature, domain, bytes a token on disk (normalisers included), mass of
the stored tokens, KL(full || rebuilt), and the student's parameter gradient, summed over all rows, against the one of
live full-vocabulary distillation: cosine and ratio of norms. `renormalised` is the top-k of other tools: the stored
probabilities divided by their sum. Needs about 16 GB for 8 rows of 512 tokens of SmolLM2-135M.

Without --teacher, or the variable SMOLLM2, the teacher of `coldstill demo` and the built-in corpus stand in.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from recovery import teacher_and_source
from torch import Tensor

from coldstill.cache.manifest import Manifest
from coldstill.pipeline.estimates.fidelity import FidelityJudge
from coldstill.pipeline.losses.divergences import Events
from coldstill.pipeline.losses.logits_targets import BucketedTopk, FullDistribution, LogitsTarget
from coldstill.pipeline.losses.student_logits import Request, StudentEvents
from coldstill.pipeline.models import load_model
from coldstill.pipeline.models.labels import counts_of
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.outputs.run_index import find_run_rows
from coldstill.pipeline.precompute import precompute
from coldstill.pipeline.recipe.file import parse_recipe
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.stage_one.capture import capture
from coldstill.pipeline.stage_two.target_sources import StoredTargets
from coldstill.pipeline.students.folders import find_student
from coldstill.pipeline.targets.captured import CaptureRequest

TEMPERATURES = (1.0, 2.0, 4.0)
KINDS: dict[str, dict[str, Any]] = {
    "topk k=16": {"kind": "topk", "k": 16},
    "topk k=64": {"kind": "topk", "k": 64},
    "topk_sampled k=16 samples=16": {"kind": "topk_sampled", "k": 16, "samples": 16},
    "topk_sampled k=32 samples=32": {"kind": "topk_sampled", "k": 32, "samples": 32},
    "final int8": {"kind": "final", "encoding": "int8"},
    **{
        f"final coded step={step}": {"kind": "final", "encoding": "coded", "step": step}
        for step in (0.01, 0.02, 0.03, 0.05, 0.08)
    },
}


@dataclass(frozen=True)
class RenormalisedTopk:
    """What other tools train on: the stored tokens as if there were no others."""

    stored: BucketedTopk

    @property
    def temperature(self) -> float:
        """What logits are divided by."""
        return self.stored.temperature

    @property
    def token_ids(self) -> Tensor:
        """The K tokens."""
        return self.stored.token_ids

    def request(self, chunk: slice, *, of_forward_kl: bool) -> Request:
        """Ask for the K tokens, and for nothing of the others."""
        return replace(self.stored.request(chunk, of_forward_kl=of_forward_kl), has_rest=False)

    def events(self, chunk: slice, student: StudentEvents) -> Events:
        """Give K events that sum to one for the teacher, and to less for the student."""
        events = self.stored.events(chunk, student)
        return Events(events.teacher_logprobs_NE.log_softmax(dim=-1), events.student_logprobs_NE)

    def logprobs(self, _chunk: slice) -> None:
        """Give nothing: no other token has a probability."""


def main() -> None:
    options = parse()
    if options.plot:
        plot(*options.plot)
        return
    options.workdir.mkdir(parents=True, exist_ok=True)
    teacher, source = teacher_and_source(argparse.Namespace(**{**vars(options), "text": options.calibrate}))
    domains = {"calibration": source}
    for named in options.measure:
        name, _, file = named.partition("=")
        domains[name] = {"path": "text", "data_files": file, "options": {"sample_by": "document"}}
    with (options.workdir / "fidelity.jsonl").open("w") as file:
        for line in measure(options, teacher, domains):
            print(json.dumps(line), flush=True)
            file.write(json.dumps(line) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=os.environ.get("SMOLLM2"), help="the teacher's folder or hub name")
    parser.add_argument("--calibrate", help="a text file; codes are fitted to its rows, others of it are measured")
    parser.add_argument("--measure", nargs="*", default=[], metavar="NAME=FILE", help="other texts to measure")
    parser.add_argument("--rows", type=int, default=8, help="rows measured of each text")
    parser.add_argument("--workdir", type=Path, default=Path("runs/fidelity"))
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("JSONL", "SVG"), help="draw the frontier and end")
    return parser.parse_args()


def measure(options: argparse.Namespace, teacher: str, domains: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for domain, source in domains.items():
        recipes = {kind: recipe_of(options, teacher, source, logits) for kind, logits in KINDS.items()}
        precompute(*recipes.values())
        first = next(iter(recipes.values()))
        run = find_run_rows(first)
        batch = StoredTargets(run).first_rows("eval", options.rows)
        student = load_model(find_student(first), dtype="float32")
        for temperature in TEMPERATURES:
            live = live_teacher(first, batch, temperature)
            inputs = {"input_ids": batch["input_ids"]}
            judge = FidelityJudge(student, inputs, counts_of(batch), live)
            for kind, recipe in recipes.items():
                source = StoredTargets.of_recipe(recipe, run, blocks=[], temperature=temperature)
                target = source.distribution(source.first_rows("eval", options.rows), temperature)
                for name, judged in named_targets(kind, target):
                    yield {
                        "kind": name.partition(" ")[0],
                        "setting": name.partition(" ")[2],
                        "temperature": temperature,
                        "domain": domain,
                        "bytes_per_token": round(bytes_per_token(source), 1),
                        **asdict(judge.judge(judged)),
                    }
            del judge


def recipe_of(options: argparse.Namespace, teacher: str, source: dict[str, Any], logits: dict[str, Any]) -> Recipe:
    data = {
        "output": str(options.workdir),
        "cache": str(options.workdir / "caches"),
        "teacher": {"path": teacher, "dtype": "float32"},
        "data": {
            "sequence_length": 512 if options.teacher else 256,
            "train": {**source, "max_rows": 24},
            "eval": {**source, "max_rows": options.rows},
        },
        "student": {"prune": {"layers": {"remove": 4 if options.teacher else 2, "method": "importance"}}},
        "targets": {"logits": {**logits, "temperatures": list(TEMPERATURES)}, "hidden": {"blocks": "none"}},
        "loss": {"gamma": 0.0},
    }
    return parse_recipe(data, name="fidelity")


def live_teacher(recipe: Recipe, batch: dict[str, Any], temperature: float) -> FullDistribution:
    parts = Teacher.locate(recipe.teacher).parts
    rows = list(batch["input_ids"])
    states = [
        capture(parts, rows[start : start + 4], CaptureRequest(final_state=True), row_names=["row"] * 4).final_state_ND
        for start in range(0, len(rows), 4)
    ]
    state_BTD = torch.cat(states).view(*batch["input_ids"].shape, -1)
    return FullDistribution(state_BTD[counts_of(batch)].clone(), parts.output_head, temperature)


def named_targets(kind: str, target: LogitsTarget) -> Iterator[tuple[str, LogitsTarget]]:
    yield kind, target
    if isinstance(target, BucketedTopk):
        yield kind.replace("topk", "renormalised"), RenormalisedTopk(target)


def bytes_per_token(source: StoredTargets) -> float:
    """Bytes on disk of what training at one temperature reads, over the measured rows."""
    manifest = Manifest(source.run.store)
    shards = source.run.selections["eval"].shard_names
    return sum(manifest.bytes_per_token(name, shards=shards) or 0.0 for name in source.columns.logits.values())


def plot(lines: Path, image: Path) -> None:
    try:
        import matplotlib as mpl
    except ImportError:
        sys.exit("the plot needs matplotlib: pip install matplotlib")
    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams.update({"svg.hashsalt": "coldstill", "svg.fonttype": "none"})
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    shown = [row for row in rows if row["domain"] == "calibration" and row["temperature"] in (1.0, 2.0)]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for axis, temperature in zip(axes, (1.0, 2.0), strict=True):
        for kind in dict.fromkeys(row["kind"] for row in shown):
            chosen = [row for row in shown if row["kind"] == kind and row["temperature"] == temperature]
            for encoding in sorted({row["setting"].partition(" ")[0].partition("=")[0] for row in chosen}):
                points = [row for row in chosen if row["setting"].startswith(encoding)]
                points.sort(key=lambda row: row["bytes_per_token"])
                label = f"{kind} {encoding}" if kind == "final" else kind
                distance = [max(1 - row["grad_cosine"], 1e-7) for row in points]
                axis.plot([row["bytes_per_token"] for row in points], distance, "o-", label=label, markersize=4)
        axis.axhline(1e-3, color="grey", linewidth=0.8, linestyle=":")
        axis.set(xlim=(0, None), yscale="log", title=f"T = {temperature:g}", xlabel="bytes a token on disk")
        axis.grid(visible=True, which="major", alpha=0.3)
    axes[0].set_ylabel("1 - cosine with live distillation's gradient")
    axes[1].legend(fontsize=8)
    figure.savefig(image, metadata={"Date": None})


if __name__ == "__main__":
    main()
