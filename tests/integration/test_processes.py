"""Several processes train as one: `torchrun`, and so `accelerate launch`, on CPUs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def launched(num_processes: int, *arguments: object) -> Any:
    """Run the command line under torchrun, and give the JSON that it prints."""
    return json.loads(torchrun(num_processes, "-m", "coldstill.cli", *arguments, "--json"))


def torchrun(num_processes: int, *arguments: object) -> str:
    """Run a program in several processes, and give what it prints."""
    environment = {"PYTHONPATH": str(ROOT), **os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    command = [*launcher, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_train_as_one_at_the_same_global_batch(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path], workplace: Path
):
    narrow = {"student": {"path": str(workplace / "narrow")}, "mapping": {"strategy": "uniform"}}
    # Five eval rows one at a time: the second process reads one of them again, which does not count.
    judged = {"data__eval__max_rows": 5, "train__per_device_eval_batch_size": 1, "train__eval_strategy": "epoch"}
    # Every fourth row has a prompt that weighs half: mostly the batch of one process has weights, and the other's none.
    lines = [" ".join(line.split()[:9]) for line in (workplace / "text.txt").read_text().splitlines()]
    rows = [{"text": line, "prompt": "Is it so?" if index % 4 == 0 else ""} for index, line in enumerate(lines)]
    (workplace / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"path": "json", "data_files": str(workplace / "rows.jsonl"), "prompt_column": "prompt"}
    prompts = {"data__train": {**source, "max_rows": 20}, "data__eval": source, "data__prompt_weight": 0.5}
    changes = {
        **narrow, **prompts, **judged, "data__packing": False, "data__sequence_length": 60, "train__logging_steps": 1
    }  # fmt: skip
    recipe = write_recipe(**changes)
    coldstill("precompute", recipe)
    coldstill("train", recipe)
    alone = workplace / "run"
    recipe = write_recipe(output=str(workplace / "two"), **{**changes, "train__per_device_train_batch_size": 2})
    assert launched(2, "train", recipe)["trained_steps"] == 4
    want, got = (load_file(folder / "student/model.safetensors") for folder in (alone, workplace / "two"))
    start = load_file(workplace / "narrow/model.safetensors")
    for name, value in want.items():
        moved = (value - start[name]).abs().max()
        assert (got[name] - value).abs().max() <= 2e-3 * moved + 1e-7, name
    logs = [json.loads((folder / "train.json").read_text())["log"][:5] for folder in (alone, workplace / "two")]
    prefixes = [""] * 4 + ["eval_"]
    for one, two, prefix in zip(*logs, prefixes, strict=True):
        for term in ("loss", "loss_task", "loss_logits", "loss_hidden"):
            assert abs(one[prefix + term] - two[prefix + term]) <= 1e-4 * abs(one[prefix + term])


@pytest.mark.parametrize("heads", ["tied", "untied"])
def test_a_sharded_distiller_has_the_gradients_of_the_whole(heads: str):
    assert torchrun(2, ROOT / "tests/sharded_gradients.py", heads).startswith("equal: ")


def test_two_processes_fill_one_store_each_shard_once(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path], workplace: Path, monkeypatch: pytest.MonkeyPatch
):
    long_rows = {"data__sequence_length": 64, "teacher__batch_size": 1}
    trace = workplace / "trace"
    trace.mkdir()
    (workplace / "sitecustomize.py").write_text(TRACING)
    monkeypatch.setenv("PYTHONPATH", f"{workplace}:{ROOT}")
    monkeypatch.setenv("COLDSTILL_TEST_TRACE", str(trace))
    recipe = write_recipe(cache=str(workplace / "two"), **long_rows)
    summary = launched(2, "precompute", recipe)
    assert summary["missing_shards"] == 0
    written = [line for file in trace.iterdir() for line in file.read_text().splitlines()]
    commits = [line for line in written if line.startswith("commits/") and line.endswith(".json")]
    assert len(commits) == len(set(commits)) > 20
    of_process = [
        {line.split("~")[0] for line in file.read_text().splitlines() if "~hidden~" in line} for file in trace.iterdir()
    ]
    with_shards = [shards for shards in of_process if shards]
    assert len(with_shards) == 2, "both processes computed shards"
    assert not with_shards[0] & with_shards[1]
    coldstill("cache", "verify", workplace / "two")
    alone = launched(1, "precompute", write_recipe(cache=str(workplace / "one"), **long_rows))
    assert summary["computed_tokens"] == alone["computed_tokens"]
    assert stored(workplace / "two") == stored(workplace / "one")


# Runs in each child before anything else: small shards, and a list of what is published.
TRACING = """
import os, sys
if os.environ.get("COLDSTILL_TEST_TRACE"):
    import coldstill.cache.rows
    from coldstill.cache.local_objects import LocalObjects

    coldstill.cache.rows.SHARD_TOKENS = 128
    publish = LocalObjects.write_all

    def traced(self, objects):
        publish(self, objects)
        with open(f"{os.environ['COLDSTILL_TEST_TRACE']}/{os.getpid()}", "a") as file:
            file.writelines(f"{name}\\n" for name in objects)

    LocalObjects.write_all = traced
"""


def stored(root: Path) -> dict[str, bytes]:
    """Give every file of the stores below a root."""
    files = [file for file in (root / "stores").rglob("*") if file.is_file()]
    return {str(file.relative_to(root)): file.read_bytes() for file in files}
