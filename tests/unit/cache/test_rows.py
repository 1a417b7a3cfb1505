from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from store_rows import found_rows, ids_of, laid_rows, shard_rows

from coldstill.cache.errors import CorruptError, StoreNotFoundError
from coldstill.cache.identity import shard_id
from coldstill.cache.laying import SHARD_TOKENS, lay_rows, wanted_rows
from coldstill.cache.manifest import Manifest
from coldstill.cache.row_lines import ROW_SCHEMA, RowLines, sorted_lines
from coldstill.cache.rows import compact_rows, publish_rows, read_rows, split_shards
from coldstill.cache.store import Store
from coldstill.cache.tokens import TOKENS


def lay_only(store: Store, rows: list[np.ndarray]) -> pa.Table:
    return laid_rows(store, rows).rows.table()


def publish(store: Store, *tables: pa.Table) -> None:
    publish_rows(store, RowLines.of_tables(tables))


def find(store: Store, rows: list[np.ndarray]) -> list[dict]:
    return found_rows(store, rows).table().to_pylist()


def lose_tokens(store: Store, *shards: str) -> None:
    """Take back the tokens of shards, as a repair does that found them damaged."""
    Manifest(store).drop([(shard, TOKENS) for shard in shards])


def row_files(store: Store) -> list[Path]:
    return sorted(Path(store.path, "rows").iterdir())


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize(
    ("lengths", "shards"),
    [
        ([4, 6, 1], [[4, 6], [1]]),
        ([4, 7, 3, 1], [[4], [7, 3], [1]]),
        ([10, 10], [[10], [10]]),
        ([11, 1], [[11], [1]]),
        ([1, 25, 1], [[1], [25], [1]]),
        ([1] * 12, [[1] * 10, [1] * 2]),
    ],
)
def test_shards_are_filled_greedily(store: Store, make_rows, lengths: list[int], shards: list[list[int]]):
    laid = lay_only(store, make_rows(lengths))
    by_shard: dict[str, list[int]] = {}
    for line in laid.to_pylist():
        row_lengths = by_shard.setdefault(line["shard"], [])
        assert (line["position"], line["start"]) == (len(row_lengths), sum(row_lengths))
        row_lengths.append(line["length"])
    assert list(by_shard.values()) == shards


def test_a_shard_holds_about_32k_tokens(store: Store):
    assert SHARD_TOKENS == 32_768
    laid = lay_rows([], [], wanted_rows([bytes([i]) * 16 for i in range(65)], [1024] * 65))
    assert [len(lines) for _, lines, _ in laid.shards()] == [32, 32, 1]


@pytest.mark.usefixtures("small_shards")
def test_a_shard_is_named_by_its_rows(store: Store, make_rows):
    rows = make_rows([6, 4, 3])
    laid = lay_only(store, rows)
    assert laid["shard"].to_pylist() == [shard_id(ids_of(rows[:2]))] * 2 + [shard_id(ids_of(rows[2:]))]


def test_laid_rows_are_unknown_until_they_are_published(store: Store, make_rows, lay):
    rows = make_rows([4, 5])
    laid = lay_only(store, rows)
    with pytest.raises(StoreNotFoundError, match="lacks 2 of 2 rows; run: coldstill precompute"):
        find(store, rows)
    lay(store, rows)
    assert find(store, rows) == laid.to_pylist()


def test_published_rows_are_unknown_until_their_tokens_are_committed(store: Store, make_rows, lay):
    rows = make_rows([4, 5])
    laid = lay_only(store, rows)
    publish(store, laid)
    assert read_rows(store).to_pylist() == laid.to_pylist()
    with pytest.raises(StoreNotFoundError, match="lacks 2 of 2 rows; run: coldstill precompute"):
        find(store, rows)
    lay(store, rows)
    assert find(store, rows) == laid.to_pylist()


def test_how_many_rows_a_store_lacks_is_said(store: Store, make_rows, lay):
    lay(store, make_rows([4, 5]))
    with pytest.raises(StoreNotFoundError, match="lacks 1 of 3 rows"):
        find(store, make_rows([4, 5, 6]))


@pytest.mark.usefixtures("small_shards")
def test_known_rows_keep_their_place_when_more_are_asked_for(store: Store, make_rows, lay):
    rows = make_rows([4, 6, 3])
    lay(store, rows)
    before = find(store, rows)
    more = make_rows([2, 9, 1], first=10)
    mixed = [more[0], rows[2], more[1], rows[0], more[2]]
    laid = lay_only(store, mixed)
    assert laid["row"].to_pylist() == ids_of(more)
    assert not set(laid["shard"].to_pylist()) & {line["shard"] for line in before}
    lay(store, mixed)
    assert find(store, rows) == before


def test_a_row_asked_for_twice_is_laid_once_and_found_twice(store: Store, make_rows, lay):
    first, second = make_rows([4, 5])
    laid = lay_only(store, [first, second, first])
    assert laid["row"].to_pylist() == ids_of([first, second])
    selection = lay(store, [first, second, first])
    assert len(selection) == 3
    assert selection.num_tokens == 13
    assert selection.starts.tolist() == [0, 4, 0]


@pytest.mark.usefixtures("small_shards")
def test_laying_again_after_an_interruption_gives_the_same_shards(store: Store, make_rows):
    rows = make_rows([4, 6, 3, 8])
    assert lay_only(store, rows).to_pylist() == lay_only(store, rows).to_pylist()


def test_laying_no_rows_gives_none(store: Store, make_rows, lay):
    assert len(lay_only(store, [])) == 0
    lay(store, make_rows([4]))
    assert len(lay_only(store, [])) == 0
    assert len(lay_only(store, make_rows([4]))) == 0


@pytest.mark.usefixtures("small_shards")
def test_a_shard_without_tokens_is_laid_again_as_it_was_when_all_its_rows_are_asked_for(store: Store, make_rows, lay):
    rows = make_rows([4, 6, 3, 2, 9])
    selection = lay(store, rows)
    before = find(store, rows)
    first, second, third = selection.shard_names
    lose_tokens(store, first, second)
    more = make_rows([5], first=20)
    # In whatever order, and among whatever else: the shards are those of then.
    asked = [rows[4], rows[3], more[0], rows[2], rows[1], rows[0]]
    laid = split_shards(lay_only(store, asked))
    assert set(laid) == {first, second, shard_id(ids_of(more))}
    assert [laid[shard].to_pylist() for shard in (first, second)] == [before[:2], before[2:4]]
    lay(store, asked)
    assert find(store, rows) == before
    assert sorted(Manifest(store).shards(TOKENS)) == sorted([first, second, third, shard_id(ids_of(more))])


@pytest.mark.usefixtures("small_shards")
def test_the_rows_of_a_shard_without_tokens_are_unknown_when_not_all_of_them_are_asked_for(
    store: Store, make_rows, lay
):
    rows = make_rows([4, 6, 3])
    first, second = lay(store, rows).shard_names
    lose_tokens(store, first)
    with pytest.raises(StoreNotFoundError, match="lacks 2 of 3 rows"):
        find(store, rows)
    assert [line["shard"] for line in find(store, rows[2:])] == [second]
    laid = lay_only(store, [rows[0], rows[2]])
    assert laid["row"].to_pylist() == ids_of(rows[:1])
    assert laid["shard"].to_pylist() == [shard_id(ids_of(rows[:1]))]
    # What was laid anew stays where it is, when the rest of the old shard is asked for as well.
    lay(store, [rows[0]])
    moved = find(store, [rows[0]])
    lay(store, rows)
    assert find(store, [rows[0]]) == moved
    assert first not in Manifest(store).shards(TOKENS)


@pytest.mark.usefixtures("small_shards")
def test_rows_of_two_shards_without_tokens_that_share_a_row_are_laid_once(store: Store, make_rows, lay):
    rows = make_rows([4, 6])
    (first,) = lay(store, rows).shard_names
    lose_tokens(store, first)
    (second,) = lay(store, rows[:1]).shard_names
    lose_tokens(store, second)
    laid = lay_only(store, rows)
    assert sorted(laid["row"].to_pylist()) == sorted(ids_of(rows))
    lay(store, rows)
    assert [line["row"] for line in find(store, rows)] == ids_of(rows)


def test_a_row_without_tokens_is_refused(store: Store):
    with pytest.raises(ValueError, match="a row needs at least one token"):
        lay_rows([], [], wanted_rows([b"0" * 16], [0]))


def test_publishing_no_rows_writes_nothing(store: Store, make_rows, tree):
    before = tree(store.path)
    publish(store)
    assert tree(store.path) == before


def test_publishing_rows_twice_writes_them_once(store: Store, make_rows, tree):
    laid = lay_only(store, make_rows([3, 4]))
    publish(store, laid)
    before = tree(store.path)
    publish(store, laid)
    assert tree(store.path) == before


@pytest.mark.usefixtures("small_shards")
def test_the_rows_of_a_shard_come_in_their_order(store: Store, make_rows, lay):
    rows = make_rows([4, 6, 3])
    first, second = lay(store, rows).shard_names
    tables = shard_rows(store, [second, first])
    assert list(tables) == [second, first]
    assert tables[first]["row"].to_pylist() == ids_of(rows[:2])
    assert tables[second]["row"].to_pylist() == ids_of(rows[2:])


def table_of(*lines: tuple[str, int, int]) -> pa.Table:
    """Give lines of (shard, position, start), each of a row of its own."""
    shards, positions, starts = zip(*lines, strict=True)
    columns = {
        "row": pa.array([f"{shard}{position}".encode().ljust(16) for shard, position, _ in lines], pa.binary(16)),
        "shard": pa.array(shards, pa.string()).dictionary_encode(),
        "position": pa.array(positions, pa.int32()),
        "start": pa.array(starts, pa.int32()),
        "length": pa.array([1] * len(lines), pa.int32()),
    }
    return pa.table(columns, schema=ROW_SCHEMA)


LINES = [("a", 0, 0), ("a", 1, 1), ("a", 2, 2), ("b", 0, 0), ("c", 0, 0), ("c", 1, 1)]


@pytest.mark.parametrize(
    "parts",
    [
        [LINES],
        [LINES[::-1]],
        [LINES[3:], LINES[:3]],
        [LINES[::2], LINES[1::2]],
        [LINES, LINES[2:4], LINES[:1]],
        [[line] for line in LINES[::-1]],
    ],
    ids=["sorted", "reversed", "two", "interleaved", "with duplicates", "one by one"],
)
def test_the_same_rows_always_make_the_same_table(parts: Sequence[list[tuple[str, int, int]]], store: Store, tree):
    expected = table_of(*LINES)
    joined = sorted_lines([RowLines.of_tables([table_of(*lines)]) for lines in parts]).table()
    assert joined.equals(expected)
    assert joined["shard"].combine_chunks().dictionary.to_pylist() == ["a", "b", "c"]
    publish(store, expected)
    before = tree(store.path)
    publish(store, *(table_of(*lines) for lines in parts))
    assert tree(store.path) == before


def test_no_tables_make_an_empty_table():
    assert sorted_lines([]).table().equals(ROW_SCHEMA.empty_table())
    assert split_shards(sorted_lines([]).table()) == {}


@pytest.mark.usefixtures("small_shards")
def test_a_compaction_of_rows_keeps_all_in_one_file_of_the_same_bytes_in_any_order(store: Store, make_rows, tree):
    batches = [lay_only(store, make_rows([4, 6, 3], first=first)) for first in (0, 10, 20)]
    for batch in batches:
        publish(store, batch)
    known = read_rows(store)
    assert len(known) == 9
    assert len(row_files(store)) == 3
    compact_rows(store)
    assert len(row_files(store)) == 1
    assert read_rows(store).equals(known)
    expected = tree(store.path)
    compact_rows(store)
    assert tree(store.path) == expected
    store.objects.remove_folder("rows")
    for batch in batches[::-1]:
        publish(store, batch)
        compact_rows(store)
    assert tree(store.path) == expected


def test_a_death_within_a_compaction_of_rows_makes_no_row_twice(store: Store, make_rows, tree):
    for first in (0, 10):
        publish(store, lay_only(store, make_rows([4, 6], first=first)))
    parts = {file: file.read_bytes() for file in row_files(store)}
    compact_rows(store)
    expected = tree(store.path)
    known = read_rows(store)
    for file, data in parts.items():
        file.write_bytes(data)
    assert read_rows(store).equals(known)
    compact_rows(store)
    assert tree(store.path) == expected


def test_a_damaged_file_of_rows_is_corrupt_by_name_or_is_left_out(store: Store, make_rows):
    publish(store, lay_only(store, make_rows([4])))
    publish(store, lay_only(store, make_rows([5], first=5)))
    file, whole = row_files(store)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(
        CorruptError, match=rf"rows/{file.name} of store .* is corrupt: .*; run: coldstill cache repair"
    ):
        read_rows(store)
    damaged: list[str] = []
    assert len(read_rows(store, damaged=damaged)) == 1
    assert damaged == [file.name]
    with pytest.raises(CorruptError, match=file.name):
        compact_rows(store)
    assert row_files(store) == [file, whole]


def test_a_file_of_rows_under_the_name_of_another_is_corrupt(store: Store, make_rows):
    publish(store, lay_only(store, make_rows([4])))
    (file,) = row_files(store)
    file.rename(file.with_name("0123456789abcdef.parquet"))
    with pytest.raises(CorruptError, match=r"rows/0123456789abcdef\.parquet .* its content is not what it is named by"):
        read_rows(store)
