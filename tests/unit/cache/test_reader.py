import multiprocessing
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest

from cache.columns import ArraySpec, Column
from cache.errors import CorruptError, IncompleteError
from cache.identity import row_id
from cache.manifest import Manifest
from cache.objects import LocalObjects
from cache.reader import Reader, read_column, read_constants, require_complete
from cache.rows import find_rows, lay_rows, publish_rows, write_selection
from cache.store import CONSTANTS, Store, create_store, open_store
from cache.writer import write_column

LENGTHS = [4, 6, 1, 9, 23, 2, 2, 40, 3]
TOKENS = Column("tokens", {"ids": ArraySpec("uint32")})

pytestmark = pytest.mark.usefixtures("small_chunks", "small_shards")


class CountingObjects(LocalObjects):
    """Objects that count how often a part of one is read."""

    num_ranges = 0

    def read_range(self, name: str, start: int, num_bytes: int) -> bytes:
        self.num_ranges += 1
        return super().read_range(name, start, num_bytes)


def write_tokens(store: Store, rows: list[np.ndarray]) -> None:
    """Lay rows into a store and write the tokens of each shard as they were laid."""
    by_id = {row_id(row): row for row in rows}
    laid = lay_rows(store, list(by_id), [len(row) for row in by_id.values()])
    shards: dict[str, list[np.ndarray]] = {}
    for line in laid.to_pylist():
        shards.setdefault(line["shard"], []).append(by_id[line["row"]])
    manifest = Manifest(store)
    for shard, members in shards.items():
        ids = np.concatenate(members).astype("uint32")
        write_column(store, manifest, shard, TOKENS, {"ids": ids}, num_tokens=len(ids), num_rows=len(members))
    publish_rows(store, laid)


def select(store: Store, rows: list[np.ndarray]):
    return write_selection(store, find_rows(store, [row_id(row) for row in rows]), [0] * len(rows), {})


def assert_rows(reader: Reader, rows: list[np.ndarray]) -> None:
    assert len(reader) == len(rows)
    for index, row in enumerate(rows):
        np.testing.assert_array_equal(reader.row(index)["tokens"]["ids"], row)


@pytest.mark.parametrize("where", ["local", "remote"])
def test_rows_of_any_lengths_read_back(tmp_path: Path, teacher: dict, make_rows, where: str):
    root = str(tmp_path / "caches") if where == "local" else f"memory://{uuid4().hex}/caches"
    store = create_store(root, teacher)
    rows = make_rows(LENGTHS)
    write_tokens(store, rows)
    selection = select(store, rows)
    assert len(selection.shard_names()) > 4
    assert_rows(Reader(open_store(store.path), selection, ["tokens"]), rows)


def test_rows_read_in_any_order_and_more_than_once(store: Store, make_rows):
    rows = make_rows(LENGTHS)
    write_tokens(store, rows)
    chosen = [rows[index] for index in (7, 0, 7, 3, 3, 8, 1)]
    assert_rows(Reader(store, select(store, chosen), ["tokens"]), chosen)


def test_each_axis_is_cut_as_it_says(store: Store, every_axis: Column, make_rows, lay, write_shards):
    selection = lay(store, make_rows(LENGTHS))
    written = write_shards(store, Manifest(store), selection.shard_names(), every_axis)
    reader = Reader(store, selection, [every_axis.name])
    for index, length in enumerate(LENGTHS):
        values = written[selection.shards[index]]
        start, position = selection.starts[index], selection.positions[index]
        row = reader.row(index)[every_axis.name]
        assert row.keys() == every_axis.arrays.keys()
        assert row["values"].shape == (length, 3)
        np.testing.assert_array_equal(row["values"], values["values"][start : start + length])
        np.testing.assert_array_equal(row["ids"], values["ids"][start : start + length])
        np.testing.assert_array_equal(row["lengths"], values["lengths"][position])
        np.testing.assert_array_equal(row["scale"], values["scale"])
        assert {name: array.dtype for name, array in row.items()} == {
            name: np.dtype(spec.dtype) for name, spec in every_axis.arrays.items()
        }


def test_only_the_columns_asked_for_are_read(store: Store, every_axis: Column, make_rows, lay, write_shards):
    selection = lay(store, make_rows([4]))
    for column in (TOKENS, every_axis):
        write_shards(store, Manifest(store), selection.shard_names(), column)
    assert list(Reader(store, selection, ["tokens"]).row(0)) == ["tokens"]
    assert list(Reader(store, selection, [every_axis.name, "tokens"]).row(0)) == [every_axis.name, "tokens"]


def test_a_missing_row_is_an_index_error(store: Store, make_rows):
    rows = make_rows([4, 5])
    write_tokens(store, rows)
    reader = Reader(store, select(store, rows), ["tokens"])
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"row {index} of a selection of 2 rows"):
            reader.row(index)


def test_incomplete_columns_are_refused_with_their_count(
    store: Store, every_axis: Column, make_rows, lay, write_shards
):
    selection = lay(store, make_rows([10, 10, 10]))
    shards = selection.shard_names()
    manifest = Manifest(store)
    write_shards(store, manifest, shards, TOKENS)
    write_shards(store, manifest, shards[1:], every_axis)
    columns = ["tokens", every_axis.name, "logits/final"]
    message = (
        "is incomplete: 2 of 3 shards of hidden/12/mixed; 0 of 3 shards of logits/final; run: coldstill precompute"
    )
    with pytest.raises(IncompleteError, match=message) as caught:
        Reader(store, selection, columns)
    assert f"store {store.path} " in str(caught.value)
    with pytest.raises(IncompleteError, match=message):
        require_complete(manifest, selection, columns, store=store.path)
    require_complete(manifest, selection, ["tokens"], store=store.path)


def test_a_selection_needs_only_its_own_shards(store: Store, make_rows, lay, write_shards):
    rows = make_rows([10, 10])
    shards = lay(store, rows).shard_names()
    write_shards(store, Manifest(store), shards[:1], TOKENS)
    assert Reader(store, select(store, rows[:1]), ["tokens"]).row(0)["tokens"]["ids"].shape == (10,)
    with pytest.raises(IncompleteError, match="1 of 2 shards of tokens"):
        Reader(store, select(store, rows), ["tokens"])


def test_a_damaged_object_is_corrupt_by_column_array_and_shard(store: Store, make_rows):
    rows = make_rows(LENGTHS)
    write_tokens(store, rows)
    selection = select(store, rows)
    shard = selection.shards[4]
    file = Path(store.path, f"arrays.zarr/shards/{shard}/tokens/ids/c/0")
    file.write_bytes(file.read_bytes()[:3] + b"\0" + file.read_bytes()[4:])
    reader = Reader(store, selection, ["tokens"])
    with pytest.raises(CorruptError, match=f"column tokens, array ids, shard {shard}, in .*: chunk 0 fails its crc32c"):
        reader.row(4)
    np.testing.assert_array_equal(reader.row(0)["tokens"]["ids"], rows[0])


@pytest.mark.parametrize(
    ("limit", "value"), [("_CHUNK_CACHE_BYTES", 130), ("_CHUNK_CACHE_BYTES", 0), ("_OPEN_ARRAYS", 1)]
)
def test_a_reader_that_forgets_still_reads_right(store: Store, make_rows, monkeypatch, limit: str, value: int):
    monkeypatch.setattr(f"cache.reader.{limit}", value)
    rows = make_rows(LENGTHS)
    write_tokens(store, rows)
    objects = CountingObjects(store.path)
    reader = Reader(Store(objects, store.teacher), select(store, rows), ["tokens"])
    assert_rows(reader, rows)
    once = objects.num_ranges
    assert_rows(reader, rows)
    if limit == "_CHUNK_CACHE_BYTES":
        assert objects.num_ranges > once, "nothing was forgotten, so the cache is not bounded"


def test_a_chunk_that_is_remembered_is_not_read_again(store: Store, make_rows):
    rows = make_rows(LENGTHS)
    write_tokens(store, rows)
    objects = CountingObjects(store.path)
    reader = Reader(Store(objects, store.teacher), select(store, rows), ["tokens"])
    assert_rows(reader, rows)
    once = objects.num_ranges
    assert_rows(reader, rows)
    assert objects.num_ranges == once


def read_in_child(path: str, selection, connection) -> None:
    reader = Reader(open_store(path), selection, ["tokens"])
    connection.send([reader.row(index)["tokens"]["ids"].tolist() for index in range(len(reader))])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_store_opens_in_a_forked_worker_after_its_parent_has_read_it(store: Store, make_rows):
    rows = make_rows(LENGTHS)
    write_tokens(store, rows)
    selection = select(store, rows)
    assert_rows(Reader(store, selection, ["tokens"]), rows)
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=read_in_child, args=(store.path, selection, sender))
    child.start()
    try:
        assert receiver.poll(20), "the worker hangs"
        assert receiver.recv() == [row.tolist() for row in rows]
    finally:
        child.kill()
        child.join()


def test_a_whole_column_reads_back(store: Store, every_axis: Column, fill):
    values = fill(every_axis, num_tokens=100, num_rows=9)
    record = write_column(store, Manifest(store), "s0", every_axis, values, num_tokens=100, num_rows=9)
    read = read_column(store, record)
    for name, array in values.items():
        np.testing.assert_array_equal(read[name], array)


def test_constants_read_back_with_their_record(store: Store):
    column = Column("output_head", {"weight": ArraySpec("float32", (50, 3), "shard")}, {"scale": 2.0})
    weight = np.arange(150, dtype="float32").reshape(50, 3)
    write_column(store, Manifest(store), CONSTANTS, column, {"weight": weight}, num_tokens=0, num_rows=0)
    values, record = read_constants(store, "output_head")
    np.testing.assert_array_equal(values["weight"], weight)
    assert record.column == column


def test_constants_that_were_never_committed_are_refused(store: Store):
    with pytest.raises(IncompleteError, match=r"store .* has no output_head; run: coldstill precompute"):
        read_constants(store, "output_head")
