"""Several commands at once on one store: nothing is computed twice, and the bytes are those of one alone."""

import json
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from forked import Forks
from watched import wanted

SHARD_TOKENS = 72  # three rows of 24


@dataclass(frozen=True)
class Ended:
    """A `coldstill precompute` that ended: its exit code, what it said, and what it committed."""

    code: int
    output: str
    errors: str
    commits: list[str]

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads(self.output)


def run_at_once(forks: Forks, folder: Path, *commands: list[str]) -> list[Ended]:
    """Run `coldstill` in one process for each command, all at once."""
    folder.mkdir()
    children = []
    for number, command in enumerate(commands):
        told = wanted(shard_tokens=SHARD_TOKENS, commits=folder / f"commits{number}", meets=(folder, len(commands)))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        children.append(subprocess.Popen(forks.command("watched", told, *command), **pipes))
    ended = []
    for number, child in enumerate(children):
        output, errors = child.communicate(timeout=120)
        commits = [line for file in folder.glob(f"commits{number}.*") for line in file.read_text().splitlines()]
        ended.append(Ended(child.returncode, output, errors, commits))
    return ended


def stores(root: Path) -> dict[str, bytes]:
    """Give every file of a root's stores but those of writers: name -> bytes."""
    files = [path for path in (root / "stores").rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.fixture
def short_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coldstill.cache.laying.SHARD_TOKENS", SHARD_TOKENS)


@pytest.fixture
def alone(coldstill: Callable[..., Any], write_recipe: Callable[..., Path], workplace: Path, short_shards: None) -> Any:
    """The store as one process makes it, in a root of its own."""
    coldstill("precompute", write_recipe(cache=str(workplace / "alone")))
    return stores(workplace / "alone")


def test_two_that_precompute_the_same_at_once_compute_nothing_twice_and_one_of_them_may_be_refused(
    forks: Forks,
    alone: dict[str, bytes],
    coldstill: Callable[..., Any],
    write_recipe: Callable[..., Path],
    workplace: Path,
):
    recipe = str(write_recipe())
    ended = run_at_once(forks, workplace / "at_once", *[["precompute", recipe, "--json"]] * 2)
    assert [one.code for one in ended if one.code not in (0, 2)] == [], [one.errors for one in ended]
    assert 0 in [one.code for one in ended], [one.errors for one in ended]
    for one in ended:
        if one.code == 2:
            lines = [line for line in one.errors.splitlines() if line.startswith("coldstill: ")]
            assert len(lines) == 1
            assert "is in use: process" in lines[0]
            assert "Traceback" not in one.errors
    both = [line for one in ended for line in one.commits]
    assert max(Counter(both).values()) == 1, "something was committed twice"
    assert stores(workplace / "caches") == alone
    coldstill("cache", "verify", workplace / "caches")
    assert json.loads(coldstill("precompute", recipe, "--json").stdout)["computed_tokens"] == 0
    coldstill("train", recipe)


def test_two_workers_at_once_fill_the_store_with_disjoint_shards(
    forks: Forks,
    alone: dict[str, bytes],
    coldstill: Callable[..., Any],
    write_recipe: Callable[..., Path],
    workplace: Path,
):
    recipe = str(write_recipe())
    commands = [["precompute", recipe, "--json", "--worker", f"{number}/2"] for number in (1, 2)]
    ended = run_at_once(forks, workplace / "at_once", *commands)
    assert [one.code for one in ended] == [0, 0], [one.errors for one in ended]
    both = [line for one in ended for line in one.commits]
    assert max(Counter(both).values()) == 1, "something was committed twice"
    computed = [{line.split()[0] for line in one.commits if not line.endswith(" tokens")} for one in ended]
    assert not computed[0] & computed[1] - {"constants"}
    assert all(len(shards) >= 3 for shards in computed), "one of them did all the work"
    assert sum(one.summary["computed_tokens"] for one in ended) == 624
    assert min(one.summary["missing_shards"] for one in ended) == 0
    coldstill("cache", "verify", workplace / "caches")
    # The one that ends last folds the small files; where both found the other at work, the next run does.
    assert json.loads(coldstill("precompute", recipe, "--json").stdout)["computed_tokens"] == 0
    assert stores(workplace / "caches") == alone


@pytest.mark.parametrize("order", [(1, 2), (2, 1), (3, 1, 2)], ids=str)
def test_workers_one_after_another_complete_the_store(
    alone: dict[str, bytes],
    coldstill: Callable[..., Any],
    write_recipe: Callable[..., Path],
    workplace: Path,
    order: tuple[int, ...],
):
    recipe = write_recipe()
    shares = [
        json.loads(coldstill("precompute", recipe, "--worker", f"{number}/{len(order)}", "--json").stdout)
        for number in order
    ]
    assert sum(share["computed_tokens"] for share in shares) == 624
    assert [share["missing_shards"] > 0 for share in shares] == [True] * (len(order) - 1) + [False]
    assert stores(workplace / "caches") == alone


def test_a_worker_that_begins_when_another_is_half_done_is_not_refused(
    coldstill: Callable[..., Any],
    write_recipe: Callable[..., Path],
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    short_shards: None,
):
    from coldstill.pipeline.stage_one.shard_jobs import ShardComputer

    recipe = write_recipe()
    run = ShardComputer.run
    shards_done = []

    def run_and_let_the_other_begin(self: ShardComputer, jobs: Any, *others: Any) -> None:
        run(self, jobs, *others)
        shards_done.extend(job.shard for job in jobs)
        if len(shards_done) == 2:
            coldstill("precompute", recipe, "--worker", "2/2")

    monkeypatch.setattr(ShardComputer, "run", run_and_let_the_other_begin)
    coldstill("precompute", recipe, "--worker", "1/2")
    assert len(shards_done) == len(set(shards_done)) == 9
    assert json.loads(coldstill("precompute", recipe, "--json").stdout)["computed_tokens"] == 0
