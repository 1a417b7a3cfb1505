"""What lies in a root, and what may be removed of it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from coldstill.cache.audit import audit_store
from coldstill.cache.columns import Column
from coldstill.cache.errors import CorruptError, InUseError, StoreNotFoundError
from coldstill.cache.index import read_entry, write_entry
from coldstill.cache.inventory import choose_stores, describe_store, list_stores, remove_column, remove_store
from coldstill.cache.leases import hold
from coldstill.cache.manifest import Manifest
from coldstill.cache.selections import Selection
from coldstill.cache.store import Store, create_store
from coldstill.cache.tokens import TOKENS
from coldstill.cli import app

MIXED = "hidden/12/mixed"
OTHER_TEACHER = {"identity": {"config": "c1", "weights": "w1", "dtype": "float32"}, "model": "another/teacher"}


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "caches")


@pytest.fixture
def selection(fill_store: Callable[..., Selection]) -> Selection:
    """Tokens in two shards, a column in the first of them, and a constant."""
    return fill_store(num_shards=1)


def test_a_store_is_described_with_its_columns_shares_and_sizes(store: Store, selection: Selection, root: str):
    (summary,) = [describe_store(root, name) for name in list_stores(root)]
    assert (summary.name, summary.path) == (store.name, store.path)
    assert summary.teacher["model"] == "some/teacher"
    assert (summary.num_rows, summary.num_tokens, summary.num_shards) == (3, 17, 2)
    columns = {column.name: column for column in summary.columns}
    assert list(columns) == [MIXED, "output_head", TOKENS]
    assert (columns[TOKENS].num_shards, columns[TOKENS].share, columns[TOKENS].num_tokens) == (2, 1.0, 17)
    assert (columns[MIXED].num_shards, columns[MIXED].share, columns[MIXED].num_tokens) == (1, 0.5, 8)
    assert (columns["output_head"].share, columns["output_head"].bytes_per_token) == (1.0, None)
    objects = [path for path in Path(store.path, "arrays.zarr").rglob("c.*") if path.is_file()]
    assert summary.num_bytes == sum(path.stat().st_size for path in objects)
    mixed = [path for path in objects if "mixed" in path.parts]
    assert columns[MIXED].bytes_per_token == sum(path.stat().st_size for path in mixed) / 8
    (described,) = summary.selections
    assert (described.name, described.num_rows, described.num_tokens) == (selection.name, 3, 17)
    assert summary.writers == []
    assert summary.age_s is not None
    assert 0 <= summary.age_s < 3600


def test_a_store_that_is_empty_is_described_too(store: Store, root: str):
    (summary,) = [describe_store(root, name) for name in list_stores(root)]
    assert (summary.num_rows, summary.num_tokens, summary.num_shards, summary.num_bytes) == (0, 0, 0, 0)


def test_writers_are_named(store: Store, selection: Selection, root: str):
    with hold(store.objects, ["s0"]):
        assert [re.sub(r"\d+", "N", writer) for writer in describe_store(root, store.name).writers] == ["process N"]


def test_a_root_without_stores_is_refused(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StoreNotFoundError, match=f"no store in {folder}; a root is what a recipe names as `cache`"):
            list_stores(str(folder))


def test_a_removed_store_takes_along_what_leads_to_it_and_leaves_the_others(
    store: Store, selection: Selection, root: str, tree: Callable[..., Any]
):
    other = create_store(root, OTHER_TEACHER)
    write_entry(root, "rows", "of the store", {"store": store.name, "selections": {}})
    write_entry(root, "rows", "of another", {"store": other.name, "selections": {}})
    write_entry(root, "student", "of a student", {"folder": "s0"})
    Path(root, "index/rows-damaged.json").write_text("{")
    kept = tree(other.path)
    remove_store(root, store.name)
    assert list_stores(root) == [other.name]
    assert not Path(store.path).exists()
    assert tree(other.path) == kept
    assert read_entry(root, "rows", "of another")["store"] == other.name
    assert read_entry(root, "student", "of a student") == {"folder": "s0"}
    assert Path(root, "index/rows-damaged.json").exists()
    with pytest.raises(StoreNotFoundError):
        read_entry(root, "rows", "of the store")


def test_a_store_whose_root_metadata_is_damaged_can_be_removed(store: Store, selection: Selection, root: str):
    Path(store.path, "arrays.zarr/zarr.json").write_text("{")
    remove_store(root, store.name)
    assert not Path(store.path).exists()


@pytest.mark.parametrize("what", ["store", "column"])
def test_what_somebody_writes_is_not_removed(
    store: Store, selection: Selection, root: str, tree: Callable[..., Any], what: str
):
    with hold(store.objects, ["s0"]):
        before = tree(store.path)
        with pytest.raises(InUseError, match=rf"store {store.path} is in use: process \d+ writes it; wait for it"):
            remove_store(root, store.name) if what == "store" else remove_column(store, MIXED)
        assert tree(store.path) == before


def test_a_removed_column_gives_its_bytes_back_and_leaves_the_others(
    store: Store, selection: Selection, tree: Callable[..., Any]
):
    before = tree(store.path)
    manifest = Manifest(store)
    size = sum(manifest.record(shard, MIXED).stored_bytes for shard in manifest.shards(MIXED))
    assert remove_column(store, MIXED) == size > 0
    assert Manifest(store).columns() == ["output_head", TOKENS]
    left = tree(store.path)
    # The groups above it, which hold nothing else, go with it.
    gone = {name for name in before if "/hidden/" in name or name.endswith("~hidden~12~mixed.json")}
    assert {name: data for name, data in left.items() if not name.startswith("commits/")} == {
        name: data for name, data in before.items() if name not in gone and not name.startswith("commits/")
    }
    audit = audit_store(store)
    assert (audit.problems, audit.unlisted) == ([], [])


def test_a_removed_column_can_be_written_again(
    store: Store, selection: Selection, every_axis: Column, write_shards: Callable[..., Any]
):
    remove_column(store, MIXED)
    manifest = Manifest(store)
    write_shards(store, manifest, list(selection.shard_names), every_axis)
    assert set(Manifest(store).shards(MIXED)) == set(selection.shard_names)
    assert audit_store(store).problems == []


def test_a_constant_can_be_removed(store: Store, selection: Selection):
    assert remove_column(store, "output_head") > 0
    assert Manifest(store).columns() == [MIXED, TOKENS]


@pytest.mark.parametrize("column", ["hidden/7/int8", TOKENS])
def test_a_column_that_is_not_there_and_the_tokens_cannot_be_removed(
    store: Store, selection: Selection, column: str, tree: Callable[..., Any]
):
    before = tree(store.path)
    message = f"store {store.path} has no column {column} to remove; it has: {MIXED}, output_head$"
    with pytest.raises(StoreNotFoundError, match=message):
        remove_column(store, column)
    assert tree(store.path) == before


def test_stores_are_chosen_by_the_beginning_of_their_names(store: Store, root: str):
    other = create_store(root, OTHER_TEACHER)
    assert store.name[0] != other.name[0], "the test needs names that begin differently"
    both = sorted([store.name, other.name])
    assert choose_stores(root) == both
    assert choose_stores(root, other.name[:1], just_one=True) == [other.name]
    assert choose_stores(root, store.name, just_one=True) == [store.name]
    with pytest.raises(StoreNotFoundError, match=f"{root} has 2 stores; name one with --store: {', '.join(both)}$"):
        choose_stores(root, just_one=True)
    with pytest.raises(StoreNotFoundError, match=f"no store zz in {root}; name one with --store: {', '.join(both)}$"):
        choose_stores(root, "zz")


def test_a_store_that_cannot_be_opened_is_not_described_as_if_it_could(store: Store, root: str):
    Path(store.path, "arrays.zarr/zarr.json").write_text("{")
    with pytest.raises(CorruptError, match="zarr.json is corrupt"):
        describe_store(root, store.name)


@pytest.mark.parametrize("text", ['"format": 1', '"format": 2', "cut short"])
def test_the_command_removes_a_store_that_cannot_be_opened(
    store: Store, selection: Selection, root: str, coldstill: Callable[..., Any], text: str
):
    # An older format is refused with the advice to remove the store by this command.
    metadata = Path(store.path, "arrays.zarr/zarr.json")
    good = metadata.read_text()
    metadata.write_text(good.replace('"format": 3', text) if text.startswith('"') else good[:-9])
    coldstill("cache", "rm", root, "--store", store.name, "--yes")
    assert not Path(store.path).exists()


def test_a_damaged_store_does_not_hide_the_others_in_a_listing(
    store: Store, selection: Selection, root: str, coldstill: Callable[..., Any]
):
    other = create_store(root, OTHER_TEACHER)
    Path(other.path, "arrays.zarr/zarr.json").write_text("{")
    result = coldstill("cache", "ls", root, expect=1)
    assert store.name in result.stdout
    assert result.stderr.count("\n") == 1
    assert f"{other.path}/arrays.zarr/zarr.json is corrupt: it is not what was written" in result.stderr


@pytest.mark.parametrize("answer", ["n", ""])
def test_the_command_asks_before_it_removes(store: Store, selection: Selection, root: str, answer: str):
    result = CliRunner().invoke(app, ["cache", "rm", root], input=f"{answer}\n")
    assert result.exit_code == 1
    assert f"remove {store.path}: 17 tokens of ?, " in result.stderr
    assert Path(store.path).exists()
    result = CliRunner().invoke(app, ["cache", "rm", root, "--column", MIXED], input="y\n")
    assert result.exit_code == 0
    assert f"removed column {MIXED} of {store.path}" in result.stdout
    assert MIXED not in Manifest(store).columns()
