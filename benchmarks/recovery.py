"""How much of a pruned model comes back: by what is learned from, and by how the teacher's distribution is stored.

    python benchmarks/recovery.py --teacher FOLDER --text FILE [--arms ce ce_kl ...] [--workdir runs/recovery]
    python benchmarks/recovery.py --teacher FOLDER --text FILE --arms exact coded int8 topk sampled --temperature 2

The teacher loses four decoder blocks by importance and learns from packed rows of the text; other rows of the same text
judge it. Arms that are named after losses read the recipe's default targets; arms that are named after kinds of logits
target learn from cross entropy and divergence alone, `exact` from the teacher's own states in float32, which is live
full-vocabulary distillation gradient by gradient (tests/integration/test_offline_equals_online.py). Every arm is
`coldstill train` and `coldstill evaluate` in processes of their own, on one store, one after another; their times and
peak memory are those of the whole process. Prints one JSON object a line: first stage one, then each arm; the last line
holds all.

Without --teacher, or the variable SMOLLM2, the teacher of `coldstill demo` and the built-in corpus stand in.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

CE_KL = {"alpha": 0.5, "beta": 0.5, "gamma": 0.0}
LOSSES: dict[str, dict[str, Any]] = {
    "ce": {"alpha": 1.0, "beta": 0.0, "gamma": 0.0},
    "ce_kl": CE_KL,
    "ce_kl_mse": {"alpha": 0.5, "beta": 0.5, "gamma": 0.1, "hidden": "mse"},
    "ce_kl_normalised_mse": {"alpha": 0.5, "beta": 0.5, "gamma": 0.1, "hidden": "normalised_mse"},
    "ce_kl_cosine": {"alpha": 0.5, "beta": 0.5, "gamma": 0.1, "hidden": "cosine"},
}
KINDS: dict[str, dict[str, Any]] = {
    "exact": {"kind": "final", "encoding": "float32"},
    "int8": {"kind": "final", "encoding": "int8"},
    "coded": {"kind": "final", "encoding": "coded"},
    "coded_0.06": {"kind": "final", "encoding": "coded", "step": 0.06},
    "topk": {"kind": "topk", "k": 64},
    "sampled": {"kind": "topk_sampled", "k": 32, "samples": 32},
}


def main() -> None:
    options = parse()
    options.workdir.mkdir(parents=True, exist_ok=True)
    teacher, source = teacher_and_source(options)
    recipes = {arm: write_recipe(options, arm, teacher, source) for arm in options.arms}
    results = {"precompute": timed("precompute", *recipes.values())}
    print(json.dumps({"arm": "precompute", **results["precompute"]}), flush=True)
    for arm, recipe in recipes.items():
        trained = timed("train", recipe)
        judged = timed("evaluate", recipe)["summary"]
        results.setdefault("pruned", judged["models"]["pruned"])
        results[arm] = {**trained, "evaluation": judged["models"]["recovered"]}
        print(json.dumps({"arm": arm, **results[arm]}), flush=True)
    print(json.dumps(results))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=os.environ.get("SMOLLM2"), help="the teacher's folder or hub name")
    parser.add_argument("--text", help="a text file; its first rows judge, the next ones train")
    parser.add_argument("--arms", nargs="+", choices=[*LOSSES, *KINDS], default=list(LOSSES))
    parser.add_argument("--workdir", type=Path, default=Path("runs/recovery"))
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--remove", type=int, default=4)
    parser.add_argument("--train-rows", type=int, default=96)
    parser.add_argument("--eval-rows", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    return parser.parse_args()


def teacher_and_source(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    source: dict[str, Any] = {"path": "builtin:python-docs"}
    if options.text:
        source = {"path": "text", "data_files": options.text, "options": {"sample_by": "document"}}
    if options.teacher:
        return options.teacher, source
    print("no --teacher: the teacher of coldstill demo stands in, its figures are not SmolLM2's", file=sys.stderr)
    subprocess.run(
        [sys.executable, "-m", "coldstill.cli", "demo", "--folder", options.workdir / "demo"],
        check=True,
        stdout=sys.stderr,
    )
    return str(options.workdir / "demo/teacher"), source


def write_recipe(options: argparse.Namespace, arm: str, teacher: str, source: dict[str, Any]) -> Path:
    recipe = build_recipe(options, teacher, source)
    recipe["output"] = str(options.workdir / arm)
    recipe["loss"].update(LOSSES.get(arm, CE_KL))
    if arm in KINDS:
        recipe["targets"] = {"logits": KINDS[arm], "hidden": {"blocks": "none"}}
    path = options.workdir / f"{arm}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def build_recipe(options: argparse.Namespace, teacher: str, source: dict[str, Any]) -> dict[str, Any]:
    return {
        "cache": str(options.workdir / "caches"),
        "teacher": {"path": teacher, "dtype": "float32"},
        "data": {
            "sequence_length": 512 if options.teacher else 256,
            "train": {**source, "max_rows": options.train_rows},
            "eval": {**source, "max_rows": options.eval_rows},
        },
        # Only cut: what a loss brings back is what is compared here.
        "student": {"prune": {"layers": {"remove": options.remove, "method": "importance"}, "reconstruct": False}},
        "targets": {"logits": {"kind": "topk", "k": 64, "temperatures": [1, 2, 3, 4]}},
        "mapping": {"strategy": "kept", "num_pairs": 6 if options.teacher else 3},
        "loss": {"temperature": options.temperature},
        "train": {
            "num_train_epochs": 1,
            "per_device_train_batch_size": 4,
            "learning_rate": options.learning_rate,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "logging_steps": 4,
        },
    }


def timed(command: str, *recipes: Path) -> dict[str, Any]:
    """Run one command in a process of its own; give its summary and the peak memory of that process in GB."""
    arguments = [sys.executable, "-m", "coldstill.cli", command, *map(str, recipes), "--json"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"coldstill {command} failed")
    return {"summary": json.loads(output), "peak_gb": round(peak_bytes(usage) / 1e9, 2)}


def peak_bytes(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
