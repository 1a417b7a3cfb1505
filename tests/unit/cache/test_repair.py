"""Repair drops exactly what is wrong and mends what follows from the rest, without any teacher."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bits import flip
from store_rows import register

from coldstill.cache.arrays import read_column
from coldstill.cache.audit import StoreAudit, audit_store
from coldstill.cache.errors import InUseError
from coldstill.cache.leases import hold
from coldstill.cache.manifest import Manifest
from coldstill.cache.repair import Mended, mend_store
from coldstill.cache.row_lines import RowLines
from coldstill.cache.rows import compact_rows, publish_rows, read_rows, rows_of_shard, split_shards
from coldstill.cache.selections import Selection
from coldstill.cache.store import CONSTANTS, Store
from coldstill.cache.tokens import TOKENS

MIXED = "hidden/12/mixed"
LENGTHS = [5, 3, 9]
NOTHING = Mended(dropped=[], rewritten=0, adopted=0, removed=0)


@pytest.fixture
def selection(store: Store, fill_store: Callable[..., Selection]) -> Selection:
    """The store as a finished run leaves it: two shards with tokens and a column, and a constant."""
    chosen = fill_store()
    Manifest(store).compact()
    compact_rows(store)
    return chosen


@pytest.fixture
def shard(selection: Selection) -> str:
    """The shard that comes first in every listing."""
    return sorted(selection.shard_names)[0]


def mend(store: Store) -> Mended:
    return mend_store(store, audit_store(store))


def only(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def keys(store: Store) -> set[tuple[str, str]]:
    return {(record.shard, record.column.name) for record in Manifest(store).records()}


def findings(audit: StoreAudit) -> list[Any]:
    return [audit.problems, audit.unfinished, audit.unlisted]


def test_a_store_that_is_whole_is_left_as_it_is(store: Store, selection: Selection, tree: Callable[..., Any]):
    before = tree(store.path)
    assert mend(store) == NOTHING
    assert tree(store.path) == before


@pytest.mark.parametrize("column", [MIXED, TOKENS])
@pytest.mark.parametrize("way", ["flipped", "gone"])
def test_a_damaged_array_costs_its_column_in_its_shard_and_nothing_else(
    store: Store, selection: Selection, shard: str, tree: Callable[..., Any], column: str, way: str
):
    before, had = tree(store.path), keys(store)
    file = Path(store.path, "arrays.zarr/shards", shard, column, "ids/c.0")
    flip(file, 3) if way == "flipped" else file.unlink()
    assert mend(store) == Mended(dropped=[(shard, column)], rewritten=0, adopted=0, removed=0)
    assert keys(store) == had - {(shard, column)}
    # Groups above it that hold nothing else go with it.
    folder = f"arrays.zarr/shards/{shard}/{column.partition('/')[0]}/"
    left = tree(store.path)
    arrays = {name: data for name, data in before.items() if name.startswith("arrays.zarr/")}
    assert {name: data for name, data in left.items() if name.startswith("arrays.zarr/")} == {
        name: data for name, data in arrays.items() if not name.startswith(folder)
    }


def test_a_damaged_constant_is_dropped(store: Store, selection: Selection):
    flip(Path(store.path, "arrays.zarr/constants/output_head/weight/c.0.0"))
    assert mend(store).dropped == [(CONSTANTS, "output_head")]
    assert findings(audit_store(store)) == [[], [], []]


@pytest.mark.parametrize(
    "file",
    [
        "shards/zarr.json",
        "constants/zarr.json",
        "shards/{shard}/zarr.json",
        "shards/{shard}/hidden/12/zarr.json",
        f"shards/{{shard}}/{MIXED}/zarr.json",
        f"shards/{{shard}}/{MIXED}/values/zarr.json",
    ],
)
@pytest.mark.parametrize("way", ["flipped", "gone"])
def test_metadata_follows_from_the_records_and_is_written_again(
    store: Store, selection: Selection, shard: str, tree: Callable[..., Any], file: str, way: str
):
    before = tree(store.path)
    path = Path(store.path, "arrays.zarr", file.format(shard=shard))
    flip(path) if way == "flipped" else path.unlink()
    assert mend(store) == Mended(dropped=[], rewritten=1, adopted=0, removed=0)
    assert tree(store.path) == before


def test_metadata_above_a_dropped_column_is_written_again_as_well(store: Store, selection: Selection, shard: str):
    # The shard's group is checked with the first of its columns, which is the one that goes.
    flip(Path(store.path, "arrays.zarr/shards", shard, "zarr.json"))
    flip(Path(store.path, "arrays.zarr/shards", shard, MIXED, "ids/c.0"), 3)
    assert mend(store).dropped == [(shard, MIXED)]
    assert findings(audit_store(store)) == [[], [], []]


@pytest.mark.parametrize("way", ["flipped", "gone"])
def test_lost_records_are_found_again_in_the_arrays(
    store: Store, selection: Selection, tree: Callable[..., Any], way: str
):
    before, had = tree(store.path), keys(store)
    file = only(Path(store.path, "commits"))
    flip(file, 60) if way == "flipped" else file.unlink()
    assert keys_or_none(store) in (None, set())
    assert mend(store) == Mended(dropped=[], rewritten=0, adopted=5, removed=0)
    assert keys(store) == had
    Manifest(store).compact()
    assert tree(store.path) == before


def keys_or_none(store: Store) -> set[tuple[str, str]] | None:
    try:
        return keys(store)
    except OSError:
        return None


def test_a_column_that_lost_its_record_and_a_byte_is_removed_and_not_found_again(
    store: Store, selection: Selection, shard: str
):
    had = keys(store)
    only(Path(store.path, "commits")).unlink()
    flip(Path(store.path, "arrays.zarr/shards", shard, MIXED, "values/c.0.0"))
    mended = mend(store)
    assert (mended.adopted, mended.dropped) == (4, [])
    assert mended.removed > 0
    assert keys(store) == had - {(shard, MIXED)}
    folder = Path(store.path, "arrays.zarr/shards", shard, MIXED)
    assert [path for path in folder.rglob("*") if path.is_file()] == []
    assert findings(audit_store(store)) == [[], [], []]


@pytest.mark.parametrize("old", ['"num_tokens": ', '"check": "', '"node_type"'])
def test_a_column_that_lost_its_record_and_whose_metadata_was_altered_is_not_found_again(
    store: Store, selection: Selection, shard: str, old: str
):
    only(Path(store.path, "commits")).unlink()
    metadata = Path(store.path, "arrays.zarr/shards", shard, MIXED, "zarr.json")
    text = metadata.read_text()
    assert text.count(old) == 1
    metadata.write_text(text.replace(old, f"{old}1" if old != '"node_type"' else "node_type"))
    assert mend(store).adopted == 4
    assert (shard, MIXED) not in keys(store)
    assert findings(audit_store(store)) == [[], [], []]


def test_a_column_in_the_folder_of_another_shard_is_not_adopted(store: Store, selection: Selection, shard: str):
    had = keys(store)
    shards = Path(store.path, "arrays.zarr/shards")
    shutil.copytree(shards / shard, shards / "0000")
    assert mend(store).adopted == 0
    assert keys(store) == had
    assert [path for path in (shards / "0000").rglob("*") if path.is_file()] == []


def test_files_that_belong_to_nothing_are_removed(
    store: Store, selection: Selection, shard: str, tree: Callable[..., Any]
):
    before = tree(store.path)
    for name in (f"arrays.zarr/shards/{shard}/{MIXED}/ids/c.1", "arrays.zarr/shards/beef/tokens/ids/c.0"):
        path = Path(store.path, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"stray")
    assert mend(store) == Mended(dropped=[], rewritten=0, adopted=0, removed=2)
    assert tree(store.path) == before


@pytest.mark.parametrize("way", ["flipped", "gone"])
def test_rows_are_made_again_from_the_tokens(store: Store, selection: Selection, tree: Callable[..., Any], way: str):
    before, rows = tree(store.path), read_rows(store)
    file = only(Path(store.path, "rows"))
    flip(file, 60) if way == "flipped" else file.unlink()
    assert mend(store) == NOTHING
    assert read_rows(store).equals(rows)
    assert tree(store.path) == before


def test_rows_of_several_files_of_which_one_is_damaged_are_made_again(
    store: Store, selection: Selection, make_rows: Callable[..., Any], tree: Callable[..., Any]
):
    # Two runs, each with a file of its own, of which the second is damaged.
    rows = make_rows([4, 2], first=len(LENGTHS))
    first = only(Path(store.path, "rows"))
    register(store, rows)
    known = read_rows(store)
    (second,) = set(Path(store.path, "rows").iterdir()) - {first}
    before = tree(store.path)
    flip(second, 60)
    mend(store)
    assert read_rows(store).equals(known)
    assert tree(store.path) == before


def test_rows_that_contradict_their_tokens_give_way_to_them_and_others_stay(
    store: Store, selection: Selection, shard: str, tree: Callable[..., Any]
):
    before = tree(store.path)
    others = [table for name, table in split_shards(read_rows(store)).items() if name != shard]
    only(Path(store.path, "rows")).unlink()
    wrong = rows_of_shard(shard, np.frombuffer(b"0" * 16, "V16"), [4]).table()
    publish_rows(store, RowLines.of_tables([wrong, *others]))
    assert mend(store) == NOTHING
    assert tree(store.path) == before


def test_rows_whose_tokens_are_gone_stay_known_so_that_they_are_laid_as_they_were(
    store: Store, selection: Selection, shard: str
):
    known = read_rows(store)
    flip(Path(store.path, "arrays.zarr/shards", shard, TOKENS, "ids/c.0"), 3)
    mend(store)
    assert read_rows(store).equals(known)


def test_a_damaged_selection_is_removed(store: Store, selection: Selection):
    file = only(Path(store.path, "selections"))
    flip(file, 60)
    mend(store)
    assert not file.exists()
    assert findings(audit_store(store)) == [[], [], []]


def test_nothing_is_changed_while_somebody_writes(
    store: Store, selection: Selection, shard: str, tree: Callable[..., Any]
):
    flip(Path(store.path, "arrays.zarr/shards", shard, MIXED, "ids/c.0"), 3)
    audit = audit_store(store)
    with hold(store.objects, [shard]):
        before = tree(store.path)
        with pytest.raises(InUseError, match=rf"store {store.path} is in use: process \d+ writes it; wait for it"):
            mend_store(store, audit)
        assert tree(store.path) == before
    assert mend_store(store, audit).dropped == [(shard, MIXED)]


def test_the_file_of_a_dead_writer_is_in_nobodys_way(store: Store, selection: Selection, tree: Callable[..., Any]):
    from coldstill.cache.processes import process_token

    before = tree(store.path)
    machine, process_id, _ = process_token().split("-")
    folder = Path(store.path, "writers")
    folder.mkdir(exist_ok=True)
    (folder / "a.json").write_text(f'{{"process": "{machine}-{process_id}-1", "shards": [], "beat": 0}}')
    assert mend(store) == NOTHING
    assert tree(store.path) == before


def test_half_written_objects_are_swept(store: Store, selection: Selection, tree: Callable[..., Any]):
    before = tree(store.path)
    folder = Path(store.path, ".partial")
    folder.mkdir(exist_ok=True)
    (folder / "another-1-1.0123").write_bytes(b"half")
    mend(store)
    assert tree(store.path) == before


def test_after_everything_at_once_the_store_is_clean_and_what_was_whole_reads_right(
    store: Store, selection: Selection, shard: str
):
    (other,) = set(selection.shard_names) - {shard}
    want = read_column(store, Manifest(store).record(other, MIXED))
    for folder in ("commits", "rows", "selections"):
        flip(only(Path(store.path, folder)), 60)
    shards = Path(store.path, "arrays.zarr/shards")
    flip(shards / shard / MIXED / "ids/c.0", 3)
    (shards / other / "zarr.json").unlink()
    mend(store)
    assert findings(audit_store(store)) == [[], [], []]
    assert keys(store) == {(shard, TOKENS), (other, TOKENS), (other, MIXED), (CONSTANTS, "output_head")}
    got = read_column(store, Manifest(store).record(other, MIXED))
    assert all(np.array_equal(got[name], values) for name, values in want.items())
