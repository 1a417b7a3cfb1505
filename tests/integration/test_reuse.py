"""One store serves every experiment: only what is missing is computed, by a teacher that is loaded once."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Forks

from coldstill.cache.manifest import Manifest
from coldstill.cache.reader import Reader
from coldstill.cache.store import Store, open_store
from coldstill.pipeline.outputs.run_index import find_run_rows
from coldstill.pipeline.precompute import precompute
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.students.folders import find_student
from coldstill.pipeline.train import train

PROBE_TOKENS = 24  # one row of them; no batch of rows has so few


@dataclass
class Work:
    """What the teacher did: how often it was loaded, and how many tokens it read."""

    loads: int = 0
    tokens: list[int] = field(default_factory=list)

    @property
    def tokens_of_rows(self) -> int:
        """All but those of the tiny probes that find a model's parts and hold a cut one against it."""
        return sum(tokens for tokens in self.tokens if tokens > PROBE_TOKENS)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    """Count, from outside, every load of a teacher and every token that one reads."""
    import coldstill.pipeline.models.teacher

    counted = Work()
    load = coldstill.pipeline.models.teacher.load_model

    def counting(*arguments: Any, **options: Any) -> torch.nn.Module:
        counted.loads += 1
        model = load(*arguments, **options)
        model.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
        return model

    def count(_module: torch.nn.Module, _args: tuple[()], kwargs: dict[str, Any]) -> None:
        if kwargs.get("input_ids") is not None:
            counted.tokens.append(kwargs["input_ids"].numel())

    monkeypatch.setattr(coldstill.pipeline.models.teacher, "load_model", counting)
    return counted


@pytest.fixture
def store_of(write_recipe: Callable[..., Path]) -> Iterator[Callable[..., Store]]:
    def found(recipe: Path, *overrides: str) -> Store:
        return find_run_rows(load_recipe(recipe, list(overrides))).store

    return found


def columns_of(store: Store) -> dict[str, set[str]]:
    manifest = Manifest(store)
    return {name: set(manifest.shards(name)) for name in manifest.columns()}


def test_a_sweep_over_students_losses_and_temperatures_loads_the_teacher_once(
    write_recipe: Callable[..., Path], workplace: Path, work: Work
):
    sweep = [
        ["output=runs/base"],
        ["output=runs/hot", "loss.temperature=1"],
        ["output=runs/logits", "loss.gamma=0"],
        ["output=runs/last", "mapping.strategy=last"],
        ["output=runs/two", "student.prune.layers.remove=2"],
        ["output=runs/important", "student.prune.layers.method=importance"],
    ]
    file = write_recipe()
    recipes = [load_recipe(file, [f"output={workplace}/{each[0].split('=')[1]}", *each[1:]]) for each in sweep]
    summary = precompute(*recipes)
    assert work.loads == 1
    num_rows, calibration, judged = 26, 16, 4
    # Each row once; the calibration rows for the importance; the four train rows behind them for the teacher's loss,
    # whatever is cut of it.
    assert work.tokens_of_rows == (num_rows + calibration + judged) * 24
    assert summary.computed_tokens == num_rows * 24
    assert len(set(summary.students)) == 3
    for recipe in recipes:
        assert train(recipe).trained_steps == 4
    assert work.loads == 1, "training loads no teacher"
    again = precompute(*recipes)
    assert (work.loads, again.computed_tokens, again.teacher_was_loaded) == (1, 0, False)


@dataclass(frozen=True)
class Extension:
    """A change of the recipe, and the columns that it needs besides those that are there."""

    name: str
    overrides: tuple[str, ...]
    new: tuple[str, ...]


EXTENSIONS = [
    Extension("block", ("targets.hidden.blocks=[0,1,2,3]",), ("hidden/3/int8",)),
    Extension("temperature", ("targets.logits.temperatures=[1,2,4]",), ("logsumexp/4",)),
    Extension("larger k", ("targets.logits.k=32",), ("logits/topk/32/delta",)),
    Extension("smaller k", ("targets.logits.k=8",), ()),
    Extension("dropped block", ("targets.hidden.blocks=[0]", "loss.gamma=0"), ()),
    Extension("encoding", ("targets.hidden.encoding=float16",), tuple(f"hidden/{b}/float16" for b in range(3))),
    Extension(
        "several at once",
        ("targets.hidden.blocks=[3]", "targets.logits.temperatures=[3]", "loss.gamma=0", "loss.temperature=3"),
        ("hidden/3/int8", "logsumexp/3"),
    ),
]


@pytest.mark.parametrize("extension", EXTENSIONS, ids=lambda extension: extension.name)
def test_only_the_missing_columns_are_computed_in_one_pass(
    extension: Extension, write_recipe: Callable[..., Path], work: Work, store_of: Callable[..., Store]
):
    file = write_recipe()
    precompute(load_recipe(file, []))
    before, tokens_before, loads_before = columns_of(store_of(file)), work.tokens_of_rows, work.loads
    summary = precompute(load_recipe(file, list(extension.overrides)))
    after = columns_of(store_of(file))
    assert set(after) - set(before) == set(extension.new)
    assert all(after[name] == shards for name, shards in before.items())
    computed = 26 * 24 if extension.new else 0
    assert summary.computed_tokens == computed
    assert work.loads - loads_before == bool(extension.new)
    assert work.tokens_of_rows - tokens_before == computed, "each row once"


def test_more_rows_cost_only_the_new_ones(write_recipe: Callable[..., Path], work: Work):
    file = write_recipe(data__train__max_rows=10)
    assert precompute(load_recipe(file, [])).computed_tokens == 16 * 24
    assert precompute(load_recipe(file, ["data.train.max_rows=20"])).computed_tokens == 10 * 24
    assert precompute(load_recipe(file, ["data.train.max_rows=15"])).computed_tokens == 0


def test_another_data_set_shares_the_store_of_the_teacher(write_recipe: Callable[..., Path], workplace: Path):
    file = write_recipe()
    first = precompute(load_recipe(file, []))
    other = workplace / "other.txt"
    lines = (workplace / "text.txt").read_text().splitlines()
    other.write_text("\n".join(" ".join(reversed(line.split())) for line in lines))
    overrides = [f"data.{split}.data_files={other}" for split in ("train", "eval")]
    second = precompute(load_recipe(file, overrides))
    assert second.store == first.store
    assert second.computed_tokens == second.num_tokens
    assert precompute(load_recipe(file, [])).computed_tokens == 0


def test_recipes_of_one_call_share_teacher_and_cache(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path], workplace: Path
):
    first = write_recipe()
    second = workplace / "second.yaml"
    second.write_text(first.read_text().replace("caches", "others"))
    result = coldstill("precompute", first, second, expect=2)
    assert "differ in `cache`; recipes that are precomputed together share teacher and cache" in result.stderr


def test_a_dry_run_says_what_is_missing_and_writes_nothing(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path], workplace: Path
):
    recipe = write_recipe()
    planned = json.loads(coldstill("precompute", recipe, "--dry-run", "--json").stdout)
    assert not (workplace / "caches").exists()
    assert not (workplace / "run").exists()
    done = json.loads(coldstill("precompute", recipe, "--json").stdout)
    assert planned["computed_tokens"] == done["computed_tokens"] == 624
    assert planned["students_to_prune"] == 1
    assert done["written_bytes"] <= 1.2 * planned["missing_bytes"], "small columns do not compress"
    more = json.loads(coldstill("precompute", recipe, "targets.hidden.blocks=[0,1,2,3]", "--dry-run", "--json").stdout)
    lacking = {column["name"] for column in more["columns"] if column["num_complete"] < column["num_shards"]}
    assert lacking == {"hidden/3/int8"}
    text = coldstill("precompute", recipe, "--dry-run").stdout
    assert "everything is complete: precompute would load no teacher" in text


def test_a_dry_run_counts_the_blocks_that_only_pruning_decides(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path]
):
    recipe = write_recipe(student__prune__layers__method="importance")
    text = coldstill("precompute", recipe, "--dry-run").stdout
    assert "hidden/(3 blocks)/int8" in text
    assert "3 mapped blocks: which ones is known when the student's blocks are chosen" in text


def test_the_student_says_which_store_and_rows_it_learned_from(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path], workplace: Path
):
    recipe = write_recipe()
    coldstill("precompute", recipe)
    coldstill("train", recipe)
    run = find_run_rows(load_recipe(recipe, []))
    for folder in (workplace / "run/student", workplace / "run/checkpoints"):
        record = json.loads((folder / "provenance.json").read_text())["run"]
        assert record["store"] == run.store.name
        assert record["selections"] == {split: selection.name for split, selection in run.selections.items()}
    card = (workplace / "run/student/README.md").read_text()
    for fact in (run.store.name, run.store.teacher["identity"]["weights"], run.selections["train"].name):
        assert f"`{fact}`" in card
    assert find_student(load_recipe(recipe, [])).is_dir()


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 3, 1)])
def test_workers_that_run_one_after_another_fill_the_store_together(
    order: tuple[int, ...],
    coldstill: Callable[..., Any],
    write_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("coldstill.cache.laying.SHARD_TOKENS", 48)
    recipe = write_recipe()
    read = []
    for number in order:
        done = json.loads(coldstill("precompute", recipe, "--worker", f"{number}/3", "--json").stdout)
        read.append(done["computed_tokens"])
    assert sum(read) == 26 * 24
    assert min(read) > 150, "shares are about equal, however late a worker comes"
    assert done["missing_shards"] == 0


def test_a_share_that_is_none_is_one_line(coldstill: Callable[..., Any], write_recipe: Callable[..., Path]):
    for share in ("0/2", "3/2", "1", "a/b", "1/0"):
        result = coldstill("precompute", write_recipe(), "--worker", share, expect=2)
        assert f"--worker is '{share}'; expected i/n with i from 1 to n, such as 1/4" in result.stderr


def test_rows_are_read_while_the_store_is_being_extended(
    forks: Forks, coldstill: Callable[..., Any], write_recipe: Callable[..., Path], workplace: Path
):
    recipe = write_recipe()
    coldstill("precompute", recipe)
    run = find_run_rows(load_recipe(recipe, []))
    names = ["tokens", "logsumexp/1", "logits/topk/16/delta", "logsumexp/2", "hidden/1/int8"]

    def read() -> list[Any]:
        reader = Reader(open_store(run.store.path), run.selections["train"], names)
        return reader.rows(range(len(reader)))

    right, rounds = read(), 0
    extension = [f"output={workplace}/extended", "data.train.max_rows=null", "targets.hidden.blocks=[0,1,2,3]"]
    command = forks.command("coldstill.cli", "precompute", recipe, *extension, "--json")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as extending:
        while extending.poll() is None:
            np.testing.assert_equal(read(), right)
            rounds += 1
            time.sleep(0.01)
        assert extending.stdout is not None
        assert json.loads(extending.stdout.read())["computed_tokens"] > 26 * 24
    assert extending.returncode == 0
    assert rounds > 10
    coldstill("train", recipe)
    coldstill("cache", "verify", workplace / "caches")


@pytest.mark.parametrize(
    "override", ["teacher.batch_size=1", "teacher.device=cpu", "train.dataloader_num_workers=2", "output=elsewhere"]
)
def test_how_a_run_is_done_is_no_part_of_a_stores_identity(
    override: str, write_recipe: Callable[..., Path], workplace: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(workplace)
    file = write_recipe()
    first = precompute(load_recipe(file, []))
    second = precompute(load_recipe(file, [override]))
    assert (second.store, second.computed_tokens) == (first.store, 0)


def test_another_dtype_is_another_store(write_recipe: Callable[..., Path]):
    file = write_recipe()
    first = precompute(load_recipe(file, []))
    second = precompute(load_recipe(file, ["teacher.dtype=bfloat16"]))
    assert second.store != first.store
    assert second.computed_tokens == first.computed_tokens
