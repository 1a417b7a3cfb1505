"""Several processes train as one: `torchrun`, and so `accelerate launch`, on CPUs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def test_two_processes_train_as_one_at_the_same_global_batch(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path], workplace: Path
):
    narrow = {"student": {"path": str(workplace / "narrow")}, "mapping": {"strategy": "uniform"}}
    changes = {**narrow, "data__packing": False, "data__sequence_length": 60, "train__logging_steps": 1}
    recipe = write_recipe(**changes)
    coldstill("precompute", recipe)
    coldstill("train", recipe)
    alone = workplace / "run"
    recipe = write_recipe(output=str(workplace / "two"), **{**changes, "train__per_device_train_batch_size": 2})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "cli", "train", str(recipe), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["trained_steps"] == 4
    want, got = (load_file(folder / "student/model.safetensors") for folder in (alone, workplace / "two"))
    start = load_file(workplace / "narrow/model.safetensors")
    for name, value in want.items():
        moved = (value - start[name]).abs().max()
        assert (got[name] - value).abs().max() <= 2e-3 * moved + 1e-7, name
    logs = [json.loads((folder / "train.json").read_text())["log"][:4] for folder in (alone, workplace / "two")]
    for one, two in zip(*logs, strict=True):
        for term in ("loss", "loss_task", "loss_logits", "loss_hidden"):
            assert abs(one[term] - two[term]) <= 1e-4 * abs(one[term])
