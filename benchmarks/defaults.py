"""What the defaults make of every kind of cut: before and after training, on two texts, with time and memory.

    python benchmarks/defaults.py --teacher FOLDER --text FILE --other-text FILE [--cuts depth mlp stream all]
    python benchmarks/defaults.py ... --cuts depth --set student.prune.reconstruct=linear loss.alpha=1 loss.beta=0

A recipe says the paths, what to cut and that each row is learned once, and leaves all else to the defaults: 30 to 26
blocks of SmolLM2-135M, MLPs of 70%, 448 of 576 channels of the residual stream, or all of these. The student learns
from packed rows of the text; other rows of the same text, and rows of the other text, judge it. Every stage is a
process of its own, `coldstill prune`, `precompute`, `train` and `evaluate`, whose time and peak memory are those of the
whole process. Keys behind --set say something else than the defaults do, of all cuts. Prints one JSON object a cut.

Without --teacher, or the variable SMOLLM2, the teacher of `coldstill demo` and the built-in corpus stand in.
"""

import argparse
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import yaml
from recovery import teacher_and_source, timed

CUTS = ["depth", "mlp", "stream", "all"]
MEASURES = ("perplexity", "kl", "agreement")


def main() -> None:
    options = parse()
    options.workdir.mkdir(parents=True, exist_ok=True)
    teacher, source = teacher_and_source(options)
    for cut in options.cuts:
        print(
            json.dumps({"cut": cut, "set": options.set, **made_by_defaults(options, teacher, source, cut)}), flush=True
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=os.environ.get("SMOLLM2"), help="the teacher's folder or hub name")
    parser.add_argument("--text", help="a text file; its first rows judge, the next ones train")
    parser.add_argument("--other-text", help="a text file that only judges")
    parser.add_argument("--cuts", nargs="+", choices=CUTS, default=CUTS)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="what to do unlike the defaults")
    parser.add_argument("--workdir", type=Path, default=Path("runs/defaults"))
    parser.add_argument("--remove", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=448)
    parser.add_argument("--train-rows", type=int, default=96)
    parser.add_argument("--eval-rows", type=int, default=16)
    return parser.parse_args()


def made_by_defaults(options: argparse.Namespace, teacher: str, source: dict[str, Any], cut: str) -> dict[str, Any]:
    recipe = write_recipe(options, teacher, source, cut)
    found: dict[str, Any] = {}
    summaries = {}
    for command in ("prune", "precompute", "train", "evaluate"):
        started = time.monotonic()
        result = timed(command, recipe)
        summaries[command] = result["summary"]
        found[command] = {"seconds": round(time.monotonic() - started, 1), "peak_gb": result["peak_gb"]}
    judged = summaries["evaluate"]
    texts = judged["domains"] or {"same": judged}
    return {
        **found,
        "parameters": summaries["prune"]["report"]["parameters"],
        "tokens_per_s": round(summaries["train"]["tokens_per_s"]),
        "texts": {label: qualities(text["models"]) for label, text in texts.items()},
    }


def qualities(models: dict[str, Any]) -> dict[str, list[float]]:
    """Give each measure of teacher, pruned and recovered student, in this order."""
    return {measure: [round(models[name][measure], 4) for name in models] for measure in MEASURES}


def write_recipe(options: argparse.Namespace, teacher: str, source: dict[str, Any], cut: str) -> Path:
    layers, mlp = {"layers": {"remove": options.remove}}, {"mlp": {"keep": 0.7}}
    hidden = {"hidden": {"size": options.hidden}}
    prune = {"depth": layers, "mlp": mlp, "stream": hidden, "all": layers | mlp | hidden}[cut]
    other = {**source, "data_files": options.other_text, "max_rows": options.eval_rows, "label": "other"}
    # Runs that say something else stand beside each other, on one store.
    name = "-".join([cut, *(re.sub(r"[^A-Za-z0-9.]+", "-", said) for said in options.set)])
    recipe = default_recipe(options, teacher, source)
    recipe["output"] = str(options.workdir / name)
    if options.other_text:
        recipe["data"]["eval"] = [{**recipe["data"]["eval"], "label": "same"}, other]
    recipe["student"] = {"prune": prune}
    for said in options.set:
        set_key(recipe, *said.split("=", 1))
    path = options.workdir / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def default_recipe(options: argparse.Namespace, teacher: str, source: dict[str, Any]) -> dict[str, Any]:
    """Say the paths, and leave the rest to the defaults."""
    return {
        "cache": str(options.workdir / "caches"),
        "teacher": {"path": teacher, "dtype": "float32"},
        "data": {
            "sequence_length": 512 if options.teacher else 256,
            "train": {**source, "max_rows": options.train_rows},
            "eval": {**source, "max_rows": options.eval_rows},
        },
        "train": {"num_train_epochs": 1, "save_strategy": "no"},
    }


def set_key(recipe: dict[str, Any], dotted: str, value: str) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        recipe = recipe.setdefault(section, {})
    recipe[key] = yaml.safe_load(value)


if __name__ == "__main__":
    main()
