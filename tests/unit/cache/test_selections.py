import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from coldstill.cache.errors import CorruptError, StoreNotFoundError
from coldstill.cache.identity import row_id
from coldstill.cache.manifest import Manifest
from coldstill.cache.rows import find_rows, read_rows
from coldstill.cache.selections import (
    Selection,
    list_selections,
    make_selection,
    read_selection,
    selection_file,
    to_selection,
    write_selection,
)
from coldstill.cache.store import Store
from coldstill.cache.tokens import TOKENS

LENGTHS = [4, 5, 6, 8, 2]
LOSS_STARTS = [1, 0, 5, 2, 0]
PROVENANCE = {"tokenizer": "sha256 9c41", "dropped": {"too short": 3}, "source": "wikitext é"}

pytestmark = pytest.mark.usefixtures("small_shards")


def find(store: Store, rows: list[np.ndarray]) -> pa.Table:
    return find_rows(store, read_rows(store), Manifest(store).shards(TOKENS), [row_id(row) for row in rows])


def assert_same_selection(first: Selection, second: Selection) -> None:
    assert (first.name, dict(first.provenance)) == (second.name, dict(second.provenance))
    assert list(first.shard_names) == list(second.shard_names)
    for field in ("shard_numbers", "positions", "starts", "lengths", "loss_starts"):
        values = getattr(first, field)
        assert values.dtype == np.int32
        np.testing.assert_array_equal(values, getattr(second, field))


@pytest.fixture
def found(store: Store, make_rows, lay) -> pa.Table:
    rows = make_rows(LENGTHS)
    lay(store, rows)
    return find(store, rows)


@pytest.fixture
def selection(store: Store, found: pa.Table) -> Selection:
    return write_selection(store, found, LOSS_STARTS, PROVENANCE)


def file_of(store: Store, selection: Selection) -> Path:
    return Path(store.path, selection_file(selection.name))


def test_a_selection_reads_back_with_loss_starts_and_provenance(store: Store, selection: Selection):
    assert len(selection) == len(LENGTHS)
    assert selection.num_tokens == sum(LENGTHS)
    assert selection.loss_starts.tolist() == LOSS_STARTS
    assert selection.provenance == PROVENANCE
    assert selection.lengths.tolist() == LENGTHS
    assert_same_selection(read_selection(store, selection.name), selection)


def test_each_row_of_a_selection_has_the_place_where_it_was_found(store: Store, found: pa.Table, selection: Selection):
    for index, line in enumerate(found.to_pylist()):
        assert selection.shard_names[selection.shard_numbers[index]] == line["shard"]
        assert (selection.positions[index], selection.starts[index]) == (line["position"], line["start"])


def test_a_selections_shards_are_named_once_in_the_order_of_its_rows(store: Store, make_rows, selection: Selection):
    rows = make_rows(LENGTHS)
    assert len(selection.shard_names) == len(set(selection.shard_names)) == 3
    last = write_selection(store, find(store, [rows[4], rows[0], rows[3], rows[1]]), [0] * 4, {})
    assert list(last.shard_names) == [selection.shard_names[index] for index in (2, 0)]
    assert last.shard_numbers.tolist() == [0, 1, 0, 1]


def test_the_same_selection_has_the_same_name_and_another_has_another(
    store: Store, found: pa.Table, selection: Selection
):
    assert write_selection(store, found, LOSS_STARTS, PROVENANCE).name == selection.name
    others = [
        write_selection(store, found, [*LOSS_STARTS[:-1], 1], PROVENANCE),
        write_selection(store, found.take([1, 0, 2, 3, 4]), [0, 1, 5, 2, 0], PROVENANCE),
        write_selection(store, found.slice(0, 4), LOSS_STARTS[:4], PROVENANCE),
        write_selection(store, found, LOSS_STARTS, {**PROVENANCE, "tokenizer": "another"}),
    ]
    assert len({selection.name, *(other.name for other in others)}) == 5
    tail = write_selection(store, found.slice(2, 2), LOSS_STARTS[2:4], {})
    for written in (*others, tail):
        assert_same_selection(read_selection(store, written.name), written)
    assert {selection.name, *(other.name for other in others)} <= set(list_selections(store))
    assert len(list_selections(store)) == len(set(list_selections(store)))
    assert [dict(other.provenance) for other in others[:3]] == [PROVENANCE] * 3


def test_writing_a_selection_again_leaves_its_file_alone(store: Store, found: pa.Table, selection: Selection, tree):
    before = tree(store.path)
    file = file_of(store, selection)
    written = file.stat().st_mtime_ns
    write_selection(store, found, LOSS_STARTS, dict(reversed(PROVENANCE.items())))
    assert (tree(store.path), file.stat().st_mtime_ns) == (before, written)


def test_making_a_selection_writes_nothing(store: Store, found: pa.Table, tree):
    before = tree(store.path)
    name, table = make_selection(found, LOSS_STARTS, PROVENANCE)
    assert tree(store.path) == before
    assert_same_selection(to_selection(name, table), write_selection(store, found, LOSS_STARTS, PROVENANCE))


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "none"},
        {"compression": "snappy", "data_page_version": "2.0"},
        {"use_dictionary": False},
        {"row_group_size": 2},
        {"row_group_size": 1, "use_dictionary": False, "compression": "gzip"},
        {"write_statistics": False, "version": "1.0"},
    ],
    ids=lambda options: ", ".join(f"{key}={value}" for key, value in options.items()),
)
def test_a_selections_name_does_not_depend_on_how_parquet_wrote_it(
    store: Store, found: pa.Table, selection: Selection, options: dict
):
    _, table = make_selection(found, LOSS_STARTS, PROVENANCE)
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    file = file_of(store, selection)
    assert sink.getvalue() != file.read_bytes()
    file.write_bytes(sink.getvalue())
    assert_same_selection(read_selection(store, selection.name), selection)


def test_a_selections_name_does_not_depend_on_where_its_rows_were_found_among_others(
    store: Store, found: pa.Table, make_rows, lay, selection: Selection
):
    lay(store, make_rows([7, 3, 10], first=20))
    again = find(store, make_rows(LENGTHS))
    assert again["row"].equals(found["row"])
    sliced = pa.concat_tables([again.slice(0, 2), again.slice(2)])
    assert make_selection(sliced, LOSS_STARTS, PROVENANCE)[0] == selection.name


def test_a_selections_name_stays_what_files_on_disk_are_called():
    columns = {
        "row": pa.array([bytes(16), b"\1" * 16], pa.binary(16)),
        "shard": pa.array(["s1", "s0"], pa.string()).dictionary_encode(),
        "position": pa.array([0, 1], pa.int32()),
        "start": pa.array([0, 5], pa.int32()),
        "length": pa.array([5, 2], pa.int32()),
    }
    assert make_selection(pa.table(columns), [0, 1], {"source": "é"})[0] == "423a16f81e2efec0"


def test_a_selection_of_no_rows_reads_back(store: Store, found: pa.Table):
    empty = write_selection(store, found.slice(0, 0), [], PROVENANCE)
    assert (len(empty), empty.num_tokens, list(empty.shard_names)) == (0, 0, [])
    assert_same_selection(read_selection(store, empty.name), empty)


def test_an_unknown_selection_is_not_found(store: Store):
    with pytest.raises(StoreNotFoundError, match=r"has no selections/0123\.parquet; run: coldstill precompute"):
        read_selection(store, "0123")
    assert list_selections(store) == []


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-9], lambda data: b"<html>" + data[6:-8]])
def test_a_damaged_selection_is_corrupt_by_name(store: Store, selection: Selection, damage):
    file = file_of(store, selection)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CorruptError, match=rf"selections/{selection.name}\.parquet of store .* is corrupt") as caught:
        read_selection(store, selection.name)
    assert store.path in str(caught.value)


def test_a_selection_under_anothers_name_is_corrupt(store: Store, selection: Selection):
    file = file_of(store, selection)
    file.rename(file.with_name("0123456789abcdef.parquet"))
    with pytest.raises(
        CorruptError, match=r"selections/0123456789abcdef\.parquet of store .* its content is not what it is named by"
    ):
        read_selection(store, "0123456789abcdef")


def test_a_file_of_rows_is_no_selection(store: Store, selection: Selection):
    (rows,) = Path(store.path, "rows").iterdir()
    Path(store.path, "selections", rows.name).write_bytes(rows.read_bytes())
    with pytest.raises(CorruptError, match=rf"selections/{rows.name} of store .* is corrupt: its columns are"):
        read_selection(store, rows.stem)
