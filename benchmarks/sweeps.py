"""What each kind of cut costs and what comes back, and what each part of the loss contributes: sweeps and reports.

    python benchmarks/sweeps.py --teacher FOLDER --text FILE [--arc-easy FILE] [--sweeps students losses terms]

`students` cuts the teacher in depth (30 to 26 blocks of SmolLM2-135M), in the width of its MLPs (70%), in that of its
residual stream (576 to 448 channels) and in depth and both widths, each with the weights of its preset; in depth also
with what its blocks write fitted to the teacher's stream, as it is of itself where width is cut. `losses` learns
from the task alone, with logits, with hidden states and with all of them, three seeds each, on the student cut in
depth. `terms` gives the student cut in its residual stream no hidden term, the preset's and a normalised one. All learn
from packed rows of the text and are judged on other rows of it; with --arc-easy, a JSON lines file of `query`,
`choices` and `gold`, `students` answers the first 200 of its questions too. Each sweep is `coldstill ablate`, on one
store, and then `coldstill report`; what is complete is not run again. Prints the sweeps' tables.

Without --teacher, or the variable SMOLLM2, the teacher of `coldstill demo` and the built-in corpus stand in.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from recovery import build_recipe, teacher_and_source

DEPTH = {"loss.alpha": 0.5, "loss.beta": 0.5, "loss.gamma": 0.1}
WIDTH = {"loss.alpha": 0.4, "loss.beta": 0.4, "loss.gamma": 0.2}
LOSSES = {
    "task": {"loss.alpha": 1.0, "loss.beta": 0.0, "loss.gamma": 0.0},
    "task+logits": {"loss.gamma": 0.0},
    "task+hidden": {"loss.beta": 0.0},
    "all": {},
}
QUESTIONS = 200


def main() -> None:
    options = parse()
    options.workdir.mkdir(parents=True, exist_ok=True)
    teacher, source = teacher_and_source(options)
    recipe = build_recipe(options, teacher, source)
    recipe["output"] = str(options.workdir / "unused")
    recipe["targets"] = {}
    recipe["train"]["bf16"] = options.bf16
    for name in options.sweeps:
        sweep = SWEEPS[name](options, recipe)
        path = options.workdir / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"name": name, "output": str(options.workdir / name), **sweep}, sort_keys=False))
        coldstill("ablate", path)
        coldstill("report", options.workdir / name)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=os.environ.get("SMOLLM2"), help="the teacher's folder or hub name")
    parser.add_argument("--text", help="a text file; its first rows judge, the next ones train")
    parser.add_argument("--arc-easy", type=Path, help="a JSON lines file of query, choices and gold")
    parser.add_argument("--sweeps", nargs="+", choices=list(SWEEPS), default=list(SWEEPS))
    parser.add_argument("--workdir", type=Path, default=Path("runs/sweeps"))
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--remove", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=448)
    parser.add_argument("--train-rows", type=int, default=96)
    parser.add_argument("--eval-rows", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def students(options: argparse.Namespace, recipe: dict[str, Any]) -> dict[str, Any]:
    layers, mlp = {"remove": options.remove, "method": "importance"}, {"keep": 0.7}
    hidden = {"size": options.hidden}
    narrow = {**WIDTH, "projector.init": "least_squares"}
    sweep: dict[str, Any] = {
        "recipe": recipe,
        "seeds": [1],
        "variants": {
            "depth": {"student.prune": {"layers": layers}, **DEPTH},
            "depth, reconstructed": {"student.prune": {"layers": layers, "reconstruct": True}, **DEPTH},
            "mlp": {"student.prune": {"mlp": mlp}, **WIDTH},
            "hidden": {"student.prune": {"hidden": hidden}, **narrow},
            "depth and width": {"student.prune": {"layers": layers, "mlp": mlp, "hidden": hidden}, **narrow},
        },
    }
    if options.arc_easy:
        sweep["overrides"] = {"evaluate.tasks": [str(task_file(options))], "evaluate.limit": QUESTIONS}
    return sweep


def losses(_options: argparse.Namespace, recipe: dict[str, Any]) -> dict[str, Any]:
    return {"recipe": recipe, "seeds": [1, 2, 3], "variants": LOSSES}


def terms(options: argparse.Namespace, recipe: dict[str, Any]) -> dict[str, Any]:
    narrow = {"student.prune": {"hidden": {"size": options.hidden}}, "projector.init": "least_squares"}
    return {
        "recipe": recipe,
        "seeds": [1],
        "overrides": {**narrow, **WIDTH},
        "variants": {
            "no hidden term": {"loss.gamma": 0.0},
            "mse, 0.2": {},
            "normalised_mse, 5": {"loss.hidden": "normalised_mse", "loss.gamma": 5.0},
        },
    }


SWEEPS = {"students": students, "losses": losses, "terms": terms}


def task_file(options: argparse.Namespace) -> Path:
    """Write the harness's task over the file, worded as the harness words ARC-Easy."""
    path = options.workdir / "arc_easy_local.yaml"
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    task = {
        "task": "arc_easy_local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(options.arc_easy.resolve())}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{query}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": metrics,
        "metadata": {"version": 1.0},
    }
    path.write_text(yaml.safe_dump(task, sort_keys=False))
    return path


def coldstill(*arguments: object) -> None:
    if subprocess.run([sys.executable, "-m", "coldstill.cli", *map(str, arguments)]).returncode:
        raise SystemExit(f"coldstill {arguments[0]} failed")


if __name__ == "__main__":
    main()
