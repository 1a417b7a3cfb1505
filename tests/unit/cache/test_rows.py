from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cache.errors import CorruptError, StoreNotFoundError
from cache.identity import row_id, shard_id
from cache.rows import (
    SHARD_TOKENS,
    Selection,
    find_rows,
    lay_rows,
    publish_rows,
    read_selection,
    shard_rows,
    write_selection,
)
from cache.store import Store

PROVENANCE = {"tokenizer": "sha256 9c41", "dropped": {"too short": 3}, "source": "wikitext é"}


def ids_of(rows: list[np.ndarray]) -> list[bytes]:
    return [row_id(row) for row in rows]


def lay_only(store: Store, rows: list[np.ndarray]) -> pa.Table:
    return lay_rows(store, ids_of(rows), [len(row) for row in rows])


def assert_same_selection(first: Selection, second: Selection) -> None:
    assert (first.name, dict(first.provenance)) == (second.name, dict(second.provenance))
    for field in ("shards", "positions", "starts", "lengths", "loss_starts"):
        np.testing.assert_array_equal(getattr(first, field), getattr(second, field))


@pytest.fixture
def selection(store: Store, make_rows, lay) -> Selection:
    rows = make_rows([4, 5, 6])
    lay(store, rows)
    return write_selection(store, find_rows(store, ids_of(rows)), [1, 0, 5], PROVENANCE)


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
    laid = lay_rows(store, [bytes([i]) * 16 for i in range(65)], [1024] * 65)
    assert laid["shard"].value_counts().field("counts").to_pylist() == [32, 32, 1]


@pytest.mark.usefixtures("small_shards")
def test_a_shard_is_named_by_its_rows(store: Store, make_rows):
    rows = make_rows([6, 4, 3])
    laid = lay_only(store, rows)
    assert laid["shard"].to_pylist() == [shard_id(ids_of(rows[:2]))] * 2 + [shard_id(ids_of(rows[2:]))]


def test_laid_rows_are_unknown_until_they_are_published(store: Store, make_rows):
    rows = make_rows([4, 5])
    laid = lay_only(store, rows)
    with pytest.raises(StoreNotFoundError, match="lacks 2 of 2 rows; run: coldstill precompute"):
        find_rows(store, ids_of(rows))
    publish_rows(store, laid)
    assert find_rows(store, ids_of(rows)).to_pylist() == laid.to_pylist()


def test_how_many_rows_a_store_lacks_is_said(store: Store, make_rows, lay):
    lay(store, make_rows([4, 5]))
    with pytest.raises(StoreNotFoundError, match="lacks 1 of 3 rows"):
        find_rows(store, ids_of(make_rows([4, 5, 6])))


@pytest.mark.usefixtures("small_shards")
def test_known_rows_keep_their_place_when_more_are_asked_for(store: Store, make_rows, lay):
    rows = make_rows([4, 6, 3])
    lay(store, rows)
    before = find_rows(store, ids_of(rows)).to_pylist()
    more = make_rows([2, 9, 1], first=10)
    laid = lay_only(store, [more[0], rows[2], more[1], rows[0], more[2]])
    assert laid["row"].to_pylist() == ids_of(more)
    assert not set(laid["shard"].to_pylist()) & {line["shard"] for line in before}
    publish_rows(store, laid)
    assert find_rows(store, ids_of(rows)).to_pylist() == before


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
    assert lay_only(store, rows).equals(lay_only(store, rows))


def test_publishing_no_rows_writes_nothing(store: Store, make_rows, tree):
    before = tree(store.path)
    publish_rows(store, lay_only(store, make_rows([3])).slice(0, 0))
    assert tree(store.path) == before


def test_publishing_rows_twice_writes_them_once(store: Store, make_rows, tree):
    laid = lay_only(store, make_rows([3, 4]))
    publish_rows(store, laid)
    before = tree(store.path)
    publish_rows(store, laid)
    assert tree(store.path) == before


@pytest.mark.usefixtures("small_shards")
def test_the_rows_of_a_shard_come_in_their_order(store: Store, make_rows, lay):
    rows = make_rows([4, 6, 3])
    first, second = lay(store, rows).shard_names()
    tables = shard_rows(store, [second, first])
    assert list(tables) == [second, first]
    assert tables[first]["row"].to_pylist() == ids_of(rows[:2])
    assert tables[second]["row"].to_pylist() == ids_of(rows[2:])


@pytest.mark.usefixtures("small_shards")
def test_a_selections_shards_are_named_once_in_the_order_of_its_rows(store: Store, make_rows, lay):
    rows = make_rows([6, 6, 4])
    names = lay(store, rows).shard_names()
    assert len(names) == 2
    reordered = write_selection(store, find_rows(store, ids_of([rows[2], rows[0], rows[1]])), [0] * 3, {})
    assert reordered.shard_names() == names[::-1]


def test_a_selection_reads_back_with_loss_starts_and_provenance(store: Store, selection: Selection):
    assert selection.loss_starts.tolist() == [1, 0, 5]
    assert selection.provenance == PROVENANCE
    assert selection.lengths.tolist() == [4, 5, 6]
    assert_same_selection(read_selection(store, selection.name), selection)


def test_the_same_selection_has_the_same_name_and_another_has_another(store: Store, make_rows, selection: Selection):
    found = find_rows(store, ids_of(make_rows([4, 5, 6])))
    assert write_selection(store, found, [1, 0, 5], PROVENANCE).name == selection.name
    assert write_selection(store, found, [1, 0, 4], PROVENANCE).name != selection.name
    assert write_selection(store, found.take([1, 0, 2]), [0, 1, 5], PROVENANCE).name != selection.name


def test_an_unknown_selection_is_not_found(store: Store):
    with pytest.raises(StoreNotFoundError, match=r"has no selections/0123\.parquet; run: coldstill precompute"):
        read_selection(store, "0123")


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-9], lambda data: b"<html>" + data[6:-8]])
def test_a_damaged_selection_is_corrupt_by_name(store: Store, selection: Selection, damage):
    file = Path(store.path, "selections", f"{selection.name}.parquet")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CorruptError, match=rf"selections/{selection.name}\.parquet of store .* is corrupt") as caught:
        read_selection(store, selection.name)
    assert store.path in str(caught.value)


def test_a_selection_under_anothers_name_is_corrupt(store: Store, selection: Selection):
    folder = Path(store.path, "selections")
    (folder / f"{selection.name}.parquet").rename(folder / "0123456789abcdef.parquet")
    with pytest.raises(
        CorruptError, match=r"selections/0123456789abcdef\.parquet of store .* its content is not what it is named by"
    ):
        read_selection(store, "0123456789abcdef")


def test_a_file_of_rows_is_no_selection(store: Store, selection: Selection):
    (rows,) = Path(store.path, "rows").iterdir()
    Path(store.path, "selections", rows.name).write_bytes(rows.read_bytes())
    with pytest.raises(CorruptError, match=r"selections/.* is corrupt: its content is not what it is named by"):
        read_selection(store, rows.stem)


def test_a_damaged_file_of_rows_is_corrupt_by_name(store: Store, make_rows, selection: Selection):
    (file,) = Path(store.path, "rows").iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CorruptError, match=rf"rows/{file.name} of store .* is corrupt"):
        find_rows(store, ids_of(make_rows([4])))
