"""What a step of training costs beside plain fine-tuning, and beside distillation with a live teacher.

    python benchmarks/train_step.py --teacher FOLDER --text FILE [--rounds 6] [--precision float32 bf16]
    python benchmarks/train_step.py --teacher FOLDER --text FILE --profile topk

The teacher loses four decoder blocks by importance, and every arm (benchmarks/step_arm.py) takes steps on the same
student, rows and optimizer: `plain`, the cross entropy of the stock transformers Trainer; `topk` and `final`,
Coldstill's trainer with these logits targets and six int8 blocks; `selective`, `topk` with selective activation
checkpointing; `live`, the stock Trainer with the teacher in memory, dense logits and the same hidden terms. Every arm
is a process of its own with its own peak memory; they take steps in turns, one at a time, so that whatever the machine
does meanwhile falls on all of them alike. A step's time contains the wait for its data. Memory is measured in further
processes, whose allocator gives back at once what is freed; `resident` is what the timed processes held. The loss over
a large vocabulary is measured alone, dense and in chunks (benchmarks/loss_memory.py).

Prints one JSON object a line; the last one holds the ratios, each the worse of the precisions, and then each of them.
With --profile, one arm's largest costs by operator.

Without --teacher, or the variable SMOLLM2, the teacher of `coldstill demo` stands in.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from recovery import build_recipe, teacher_and_source
from turns import Turn

HERE = Path(__file__).parent
# Those that take turns; all at once would need more memory than a small machine has.
GROUPS = {"fine_tuning": ("plain", "topk", "final"), "live": ("topk", "selective", "live")}
TOPK = {"kind": "topk", "k": 64, "temperatures": [1, 2, 3, 4]}
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "topk": (TOPK, {}),
    "selective": (TOPK, {"activation_checkpointing": "selective"}),
    "final": ({"kind": "final"}, {}),
}


def main() -> None:
    options = parse()
    options.workdir.mkdir(parents=True, exist_ok=True)
    recipes = write_recipes(options)
    if options.profile:
        for precision in options.precision:
            subprocess.run(arm_command(options.profile, recipes, precision, "--profile"), check=True)
        return
    subprocess.run(
        [sys.executable, "-m", "coldstill.cli", "precompute", *recipes.values()], check=True, stdout=sys.stderr
    )
    head = {arm: measure_head(arm) for arm in ("dense", "chunked")}
    print(json.dumps({"head": head}), flush=True)
    by_precision = {}
    for precision in options.precision:
        groups = {name: measure_steps(options, recipes, precision, arms) for name, arms in GROUPS.items()}
        memory = {arm: measure_memory(recipes, precision, arm) for arm in ("plain", "topk", "selective")}
        by_precision[precision] = ratios(groups["fine_tuning"], groups["live"], memory)
        print(json.dumps({precision: {**groups, "memory": memory}}), flush=True)
    worst = {key: worse(key, [values[key] for values in by_precision.values()]) for key in by_precision[precision]}
    worst["head_memory_over_dense"] = round(head["chunked"]["peak_bytes"] / head["dense"]["peak_bytes"], 3)
    print(json.dumps({**worst, **by_precision}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=os.environ.get("SMOLLM2"), help="the teacher's folder or hub name")
    parser.add_argument("--text", help="a text file; its first rows judge, the next ones train")
    parser.add_argument("--workdir", type=Path, default=Path("runs/train_step"))
    parser.add_argument("--rounds", type=int, default=6, help="steps of each arm that count; one more comes before")
    parser.add_argument("--precision", nargs="+", choices=["float32", "bf16"], default=["float32", "bf16"])
    parser.add_argument("--profile", choices=[*RECIPES])
    # What `build_recipe` reads; the rows of one epoch hold every step.
    parser.set_defaults(temperature=2.0, remove=4, train_rows=64, eval_rows=4, learning_rate=1e-5)
    return parser.parse_args()


def write_recipes(options: argparse.Namespace) -> dict[str, Path]:
    teacher, source = teacher_and_source(options)
    recipes = {}
    for arm, (logits, changes) in RECIPES.items():
        recipe = build_recipe(options, teacher, source)
        recipe["output"] = str(options.workdir / arm)
        recipe["targets"] = {"logits": logits}
        recipe["train"] |= changes
        recipes[arm] = options.workdir / f"{arm}.yaml"
        recipes[arm].write_text(yaml.safe_dump(recipe))
    return recipes


def arm_command(arm: str, recipes: dict[str, Path], precision: str, *more: str) -> list[str]:
    recipe = recipes.get(arm, recipes["topk"])
    return [sys.executable, str(HERE / "step_arm.py"), arm, str(recipe), precision, *more]


def measure_head(arm: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, str(HERE / "loss_memory.py"), arm], check=True, stdout=subprocess.PIPE)
    return dict(json.loads(done.stdout))


def measure_steps(
    options: argparse.Namespace, recipes: dict[str, Path], precision: str, arms: Sequence[str]
) -> dict[str, Any]:
    """Let each arm take a step in turn, round by round, and give each arm's medians and peak."""
    steps = str(options.rounds + 1)
    turns = {arm: Turn(arm_command(arm, recipes, precision, "--steps", steps)) for arm in arms}
    rounds = [{arm: turn.take() for arm, turn in turns.items()} for _ in range(options.rounds + 1)]
    measured = {}
    for arm, turn in turns.items():
        seconds, waits = ([round_[arm][name] for round_ in rounds[1:]] for name in ("seconds", "wait"))
        measured[arm] = {
            "seconds": round(statistics.median(seconds), 3),
            "all_seconds": [round(value, 3) for value in seconds],
            "wait": round(statistics.median(waits), 4),
            "peak_bytes": turn.answer()["peak_bytes"],
        }
    return measured


def measure_memory(recipes: dict[str, Path], precision: str, arm: str) -> int:
    """Give the most memory that an arm needs in two steps, in a process that gives back what it frees at once."""
    command = arm_command(arm, recipes, precision, "--steps", "2")
    # What glibc keeps of freed memory is in pieces, differs from run to run, and is no tensor.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, input="go\ngo\n", check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def ratios(fine_tuning: dict[str, Any], live: dict[str, Any], memory: dict[str, int]) -> dict[str, float]:
    plain, topk, final = (fine_tuning[arm] for arm in ("plain", "topk", "final"))
    values = {
        "step_over_plain": topk["seconds"] / plain["seconds"],
        "final_step_over_plain": final["seconds"] / plain["seconds"],
        "live_over_train": live["live"]["seconds"] / live["topk"]["seconds"],
        "memory_over_plain": memory["topk"] / memory["plain"],
        "resident_over_plain": topk["peak_bytes"] / plain["peak_bytes"],
        "selective_over_train": live["selective"]["seconds"] / live["topk"]["seconds"],
        "selective_memory_over_plain": memory["selective"] / memory["plain"],
        "selective_resident_over_plain": live["selective"]["peak_bytes"] / plain["peak_bytes"],
        "data_wait_share": max(arm["wait"] / arm["seconds"] for arm in (topk, final)),
    }
    return {key: round(value, 4) for key, value in values.items()}


def worse(key: str, values: list[float]) -> float:
    return min(values) if key == "live_over_train" else max(values)


if __name__ == "__main__":
    main()
