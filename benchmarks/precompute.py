"""Stage one beside the teacher's bare forward pass.

    python benchmarks/precompute.py --teacher FOLDER --text FILE [--kind final] [--rounds 5] [--rows 64] [--quick]

`body` runs the teacher's body over packed rows, without its output head; `forward` lets it make its logits too. Neither
does anything with what comes of it. `precompute` is `coldstill precompute` over the same rows, in a store of its own
each time: what `targets.logits.kind` keeps, and six int8 blocks, encoded, compressed and committed. All run in float32,
four rows a batch, each in a process of its own, and take turns, so that whatever the machine does meanwhile falls on
all alike. Shards hold 8,192 tokens here, so that a round has several. Loading is not timed; encoding and writing are.

Prints one JSON object a line; the last one holds `tokens_over_bare_body` and `tokens_over_bare_forward`, the ratios of
the medians of tokens a second.

Without --teacher, or the variable SMOLLM2, the teacher of `coldstill demo` stands in.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from recovery import build_recipe, teacher_and_source
from turns import Turn, reporting, wait_for_turn

ARMS = ("body", "forward", "precompute")
SHARD_TOKENS = 8_192


def main() -> None:
    options = parse()
    if options.arm:
        run_arm(options)
        return
    options.workdir.mkdir(parents=True, exist_ok=True)
    recipe = write_recipe(options)
    command = [sys.executable, __file__, "--recipe", str(recipe), "--rounds", str(options.rounds), "--arm"]
    arms = {arm: Turn([*command, arm]) for arm in ARMS}
    rounds = [{arm: turn.take() for arm, turn in arms.items()} for _ in range(options.rounds + 1)]
    results = {}
    for arm, turn in arms.items():
        speeds = [round_[arm]["tokens_per_s"] for round_ in rounds[1:]]
        results[arm] = {
            "tokens_per_s": round(statistics.median(speeds), 1),
            "all": [round(speed, 1) for speed in speeds],
            "peak_bytes": turn.answer()["peak_bytes"],
        }
        print(json.dumps({arm: results[arm]}), flush=True)
    speed = results["precompute"]["tokens_per_s"]
    print(json.dumps({f"tokens_over_bare_{arm}": round(speed / results[arm]["tokens_per_s"], 4) for arm in ARMS[:2]}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=os.environ.get("SMOLLM2"), help="the teacher's folder or hub name")
    parser.add_argument("--text", help="a text file")
    parser.add_argument("--workdir", type=Path, default=Path("runs/precompute_speed"))
    parser.add_argument("--rounds", type=int, default=5, help="passes of each arm that count; one more comes before")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--kind", default="final", choices=("final", "topk"), help="targets.logits.kind")
    parser.add_argument("--quick", action="store_true", help="two rounds over 4 rows")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--recipe", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.rows = 2, 4
    return options


def write_recipe(options: argparse.Namespace) -> Path:
    # What `build_recipe` reads; one eval row, which keeps its last state besides.
    wanted = {"temperature": 2.0, "remove": 4, "train_rows": options.rows, "eval_rows": 1, "learning_rate": 1e-4}
    teacher, source = teacher_and_source(options)
    recipe = build_recipe(argparse.Namespace(**{**vars(options), **wanted}), teacher, source)
    recipe["output"] = str(options.workdir / "run")
    recipe["teacher"]["batch_size"] = 4
    # The last blocks are cut: choosing them by importance would be the teacher's work too.
    recipe["student"]["prune"]["layers"]["method"] = "last"
    recipe["student"]["prune"]["calibration_rows"] = 1
    recipe["mapping"]["strategy"] = "uniform"
    recipe["targets"]["logits"] = {"kind": options.kind}
    path = options.workdir / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def run_arm(options: argparse.Namespace) -> None:
    from coldstill.pipeline.recipe.file import load_recipe
    from coldstill.pipeline.runtime.peak_memory import peak_memory_bytes

    report = reporting()
    recipe = load_recipe(options.recipe)
    work = precomputed(recipe) if options.arm == "precompute" else bare(recipe, with_logits=options.arm == "forward")
    report({"ready": True})
    for _ in range(options.rounds + 1):
        wait_for_turn()
        report({"tokens_per_s": work()})
    report({"peak_bytes": peak_memory_bytes()})


def bare(recipe: Any, *, with_logits: bool) -> Any:
    import torch

    from coldstill.pipeline.models.forward import pad_rows
    from coldstill.pipeline.stage_one.requests import gather

    teacher, (gathered,) = gather([recipe])
    rows = [torch.from_numpy(row.astype("int64")) for row in gathered.rows["train"].tokens]
    model, size = teacher.parts.model if with_logits else teacher.parts.body, recipe.teacher.batch_size

    @torch.inference_mode()
    def forward() -> float:
        started = time.perf_counter()
        for start in range(0, len(rows), size):
            ids, _ = pad_rows(rows[start : start + size])
            model(input_ids=ids, use_cache=False)
        return sum(map(len, rows)) / (time.perf_counter() - started)

    return forward


def precomputed(recipe: Any) -> Any:
    import coldstill.cache.laying
    from coldstill.pipeline.precompute import precompute
    from coldstill.pipeline.prune import prune

    coldstill.cache.laying.SHARD_TOKENS = SHARD_TOKENS
    prune(recipe)  # once, and not in every round, where it would only take long

    def run() -> float:
        with tempfile.TemporaryDirectory(dir=Path(recipe.output).parent) as folder:
            shutil.copytree(Path(recipe.cache) / "students", Path(folder) / "students")
            summary = precompute(recipe.model_copy(update={"cache": folder}), show_progress=False)
            return summary.computed_tokens / summary.seconds

    return run


if __name__ == "__main__":
    main()
