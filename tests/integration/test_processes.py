"""Several processes train as one: `torchrun`, and so `accelerate launch`, on CPUs."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import Forks
from safetensors.torch import load_file
from watched import wanted

SHARD_TOKENS = 128


def torchrun(forks: Forks, num_processes: int, module: str, *arguments: object) -> str:
    """Run a module in several processes, and give what it prints."""
    launcher = ("--standalone", "--nproc-per-node", num_processes)
    command = forks.command("torch.distributed.run", *launcher, *forks.script(module), *arguments)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_train_as_one_at_the_same_global_batch(
    forks: Forks, coldstill: Callable[..., Any], write_recipe: Callable[..., Path], workplace: Path
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
    assert json.loads(torchrun(forks, 2, "coldstill.cli", "train", recipe, "--json"))["trained_steps"] == 4
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
def test_a_sharded_distiller_has_the_gradients_of_the_whole(forks: Forks, heads: str):
    assert torchrun(forks, 2, "sharded_gradients", heads).startswith("equal: ")


def test_processes_that_see_different_rows_balance_the_loss_alike(forks: Forks, tmp_path: Path):
    torchrun(forks, 2, "balanced_processes", tmp_path)
    one, other = (json.loads((tmp_path / f"{process}.json").read_text()) for process in range(2))
    assert one == other
    assert one["factors"]["loss_task"] == 1.0
    assert one["factors"]["loss_hidden"] != 1.0


def test_two_processes_fill_one_store_each_shard_once(
    forks: Forks,
    coldstill: Callable[..., Any],
    write_recipe: Callable[..., Path],
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    long_rows = {"data__sequence_length": 64, "teacher__batch_size": 1}
    recipe = write_recipe(cache=str(workplace / "two"), **long_rows)
    told = wanted(shard_tokens=SHARD_TOKENS, commits=workplace / "commits")
    summary = json.loads(torchrun(forks, 2, "watched", told, "precompute", recipe, "--json"))
    assert summary["missing_shards"] == 0
    of_process = [file.read_text().splitlines() for file in workplace.glob("commits.*")]
    commits = [line for lines in of_process for line in lines]
    assert len(commits) == len(set(commits)) > 20
    shards = [{line.split()[0] for line in lines if " hidden/" in line} for lines in of_process]
    with_shards = [computed for computed in shards if computed]
    assert len(with_shards) == 2, "both processes computed shards"
    assert not with_shards[0] & with_shards[1]
    coldstill("cache", "verify", workplace / "two")
    monkeypatch.setattr("coldstill.cache.laying.SHARD_TOKENS", SHARD_TOKENS)
    recipe = write_recipe(cache=str(workplace / "one"), **long_rows)
    alone = json.loads(coldstill("precompute", recipe, "--json").stdout)
    assert summary["computed_tokens"] == alone["computed_tokens"]
    assert stored(workplace / "two") == stored(workplace / "one")


def stored(root: Path) -> dict[str, bytes]:
    """Give every file of the stores below a root."""
    files = [file for file in (root / "stores").rglob("*") if file.is_file()]
    return {str(file.relative_to(root)): file.read_bytes() for file in files}
