"""What each part contributes: students by cut, losses, layer maps and projectors, in sweeps with reports.

    python benchmarks/sweeps.py --teacher FOLDER --text FILE [--sweeps losses mapping projectors] [--seeds 1 2 3]
    python benchmarks/sweeps.py --teacher FOLDER --text FILE --sweeps students --arc-easy FILE

All begin from the defaults. `students` cuts the teacher in depth (30 to 26 blocks of SmolLM2-135M), in the width of its
MLPs (70%), in that of its residual stream (576 to 448 channels) and in all of these. On the student cut in depth,
`losses` learns from the task, from logits, from hidden states and from what can be had of these together; `mapping`
maps blocks in each way, with hidden states and without. `projectors` brings the states of the student cut in its stream
to the teacher's width in each way. All learn from packed rows of the text and are judged on other rows of it; with
--arc-easy, a JSON lines file of `query`, `choices` and `gold`, `students` answers the first 200 of its questions too.
Each sweep is `coldstill ablate`, on one store, and then `coldstill report`; what is complete is not run again. Prints
the sweeps' tables.

Without --teacher, or the variable SMOLLM2, the teacher of `coldstill demo` and the built-in corpus stand in.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from defaults import default_recipe
from recovery import teacher_and_source

PAIRS = {"mapping.num_pairs": 6}
HIDDEN = {"loss.gamma": 1.0}
LOSSES = {
    "task": {"loss.alpha": 1.0, "loss.beta": 0.0},
    "hidden": {"loss.beta": 0.0, **HIDDEN},
    "logits": {},
    "task+logits": {"loss.alpha": 0.5, "loss.beta": 0.5},
    "logits+hidden": HIDDEN,
    "all": {"loss.alpha": 0.5, "loss.beta": 0.5, **HIDDEN},
}
PROJECTORS = {
    "fixed": {"projector.learnable": False},
    "fixed, fitted": {"projector.learnable": False, "projector.init": "least_squares"},
    "learnable": {},
    "learnable, fitted": {"projector.init": "least_squares"},
}
QUESTIONS = 200


def main() -> None:
    options = parse()
    options.workdir.mkdir(parents=True, exist_ok=True)
    teacher, source = teacher_and_source(options)
    recipe = default_recipe(options, teacher, source)
    recipe["output"] = str(options.workdir / "unused")
    recipe["student"] = {"prune": {"layers": {"remove": options.remove}}}
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
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--remove", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=448)
    parser.add_argument("--train-rows", type=int, default=96)
    parser.add_argument("--eval-rows", type=int, default=16)
    return parser.parse_args()


def students(options: argparse.Namespace, recipe: dict[str, Any]) -> dict[str, Any]:
    layers, mlp = {"layers": {"remove": options.remove}}, {"mlp": {"keep": 0.7}}
    hidden = {"hidden": {"size": options.hidden}}
    prunes = {"depth": layers, "mlp": mlp, "stream": hidden, "all": layers | mlp | hidden}
    sweep: dict[str, Any] = {
        "recipe": recipe,
        "seeds": options.seeds,
        "variants": {name: {"student.prune": prune} for name, prune in prunes.items()},
    }
    if options.arc_easy:
        sweep["overrides"] = {"evaluate.tasks": [str(task_file(options))], "evaluate.limit": QUESTIONS}
    return sweep


def losses(options: argparse.Namespace, recipe: dict[str, Any]) -> dict[str, Any]:
    return {"recipe": recipe, "seeds": options.seeds, "overrides": PAIRS, "variants": LOSSES}


def mapping(options: argparse.Namespace, recipe: dict[str, Any]) -> dict[str, Any]:
    return {
        "recipe": recipe,
        "seeds": options.seeds,
        "overrides": PAIRS | HIDDEN,
        "grid": {"mapping.strategy": ["uniform", "last", "kept", "covered"]},
    }


def projectors(options: argparse.Namespace, recipe: dict[str, Any]) -> dict[str, Any]:
    narrow = {"student.prune": {"hidden": {"size": options.hidden}}, "mapping.strategy": "uniform"}
    return {
        "recipe": recipe,
        "seeds": options.seeds,
        "overrides": narrow | PAIRS | HIDDEN,
        "variants": PROJECTORS,
    }


SWEEPS = {"students": students, "losses": losses, "mapping": mapping, "projectors": projectors}


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
