import contextlib
import multiprocessing
import tracemalloc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from store_rows import found_rows

from coldstill.cache.arrays import read_column
from coldstill.cache.columns import ArraySpec, Column
from coldstill.cache.errors import CorruptError, IncompleteError
from coldstill.cache.local_objects import LocalObjects
from coldstill.cache.manifest import Manifest
from coldstill.cache.reader import Reader, read_constants, require_complete
from coldstill.cache.selections import Selection, write_selection
from coldstill.cache.spans import RowSpans
from coldstill.cache.store import CONSTANTS, Store, create_store, open_store
from coldstill.cache.writer import write_column

LENGTHS = [4, 6, 1, 9, 23, 2, 2, 40, 3]

pytestmark = pytest.mark.usefixtures("small_chunks", "small_shards")


class CountingObjects(LocalObjects):
    """Objects that count the requests for parts of them, and the parts."""

    num_requests = 0
    num_ranges = 0
    num_bytes = 0

    def forget(self) -> None:
        """Begin to count anew."""
        self.num_requests = self.num_ranges = self.num_bytes = 0

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        self.num_requests += bool(ranges)
        self.num_ranges += len(ranges)
        parts = super().read_ranges(ranges)
        self.num_bytes += sum(map(len, parts))
        return parts


@pytest.fixture(params=["small objects", "large objects"])
def _object_sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let objects be read at once, or by their index and chunks."""
    if request.param == "large objects":
        monkeypatch.setattr("coldstill.cache.array_object.SMALL_OBJECT_BYTES", 0)


def select(store: Store, rows: list[np.ndarray]) -> Selection:
    return write_selection(store, found_rows(store, rows), [()] * len(rows), {})


def unsaid(num_rows: int) -> tuple[RowSpans, np.ndarray]:
    """Neither spans nor labels of rows."""
    return RowSpans.of_rows([()] * num_rows), np.zeros((num_rows, 0), np.float32)


def shard_of(selection: Selection, index: int) -> str:
    return selection.shard_names[selection.shard_numbers[index]]


def assert_rows(reader: Reader, rows: list[np.ndarray]) -> None:
    assert len(reader) == len(rows)
    for index, row in enumerate(rows):
        np.testing.assert_array_equal(reader.row(index)["tokens"]["ids"], row)


@pytest.mark.parametrize("where", ["local", "remote"])
def test_rows_of_any_lengths_read_back(tmp_path: Path, teacher: dict, make_rows, lay, where: str):
    root = str(tmp_path / "caches") if where == "local" else f"memory://{uuid4().hex}/caches"
    store = create_store(root, teacher)
    rows = make_rows(LENGTHS)
    lay(store, rows)
    selection = select(store, rows)
    assert len(selection.shard_names) > 4
    assert_rows(Reader(open_store(store.path), selection, ["tokens"]), rows)


def test_rows_read_in_any_order_and_more_than_once(store: Store, make_rows, lay):
    rows = make_rows(LENGTHS)
    lay(store, rows)
    chosen = [rows[index] for index in (7, 0, 7, 3, 3, 8, 1)]
    assert_rows(Reader(store, select(store, chosen), ["tokens"]), chosen)


def test_each_axis_is_cut_as_it_says(store: Store, every_axis: Column, make_rows, lay, write_shards):
    selection = lay(store, make_rows(LENGTHS))
    written = write_shards(store, Manifest(store), selection.shard_names, every_axis)
    reader = Reader(store, selection, [every_axis.name])
    for index, length in enumerate(LENGTHS):
        values = written[shard_of(selection, index)]
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
    write_shards(store, Manifest(store), selection.shard_names, every_axis)
    assert list(Reader(store, selection, ["tokens"]).row(0)) == ["tokens"]
    assert list(Reader(store, selection, [every_axis.name, "tokens"]).row(0)) == [every_axis.name, "tokens"]


def test_a_missing_row_is_an_index_error(store: Store, make_rows, lay):
    rows = make_rows([4, 5])
    lay(store, rows)
    reader = Reader(store, select(store, rows), ["tokens"])
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"row {index} of a selection of 2 rows"):
            reader.row(index)
        with pytest.raises(IndexError, match=f"row {index} of a selection of 2 rows"):
            reader.rows([0, index])


def test_incomplete_columns_are_refused_with_their_count(
    store: Store, every_axis: Column, make_rows, lay, write_shards
):
    selection = lay(store, make_rows([10, 10, 10]))
    shards = selection.shard_names
    manifest = Manifest(store)
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


def test_a_selection_needs_only_its_own_shards(store: Store, every_axis: Column, make_rows, lay, write_shards):
    rows = make_rows([10, 10])
    shards = lay(store, rows).shard_names
    write_shards(store, Manifest(store), shards[:1], every_axis)
    assert Reader(store, select(store, rows[:1]), [every_axis.name]).row(0)[every_axis.name]["ids"].shape == (10,)
    with pytest.raises(IncompleteError, match="1 of 2 shards of hidden/12/mixed"):
        Reader(store, select(store, rows), [every_axis.name])


@pytest.mark.usefixtures("_object_sizes")
def test_a_damaged_object_is_corrupt_by_column_array_and_shard(store: Store, make_rows, lay):
    rows = make_rows(LENGTHS)
    lay(store, rows)
    selection = select(store, rows)
    shard = shard_of(selection, 4)
    file = Path(store.path, f"arrays.zarr/shards/{shard}/tokens/ids/c.0")
    file.write_bytes(file.read_bytes()[:3] + b"\0" + file.read_bytes()[4:])
    reader = Reader(store, selection, ["tokens"])
    message = f"column tokens, array ids, shard {shard}, in .*: chunk 0 fails its crc32c; run: coldstill cache repair"
    for _ in range(2):
        with pytest.raises(CorruptError, match=message):
            reader.row(4)
        with pytest.raises(CorruptError, match=message):
            reader.rows(range(len(rows)))
    np.testing.assert_array_equal(reader.row(0)["tokens"]["ids"], rows[0])


@pytest.mark.usefixtures("_object_sizes")
@pytest.mark.parametrize("where", ["local", "remote"])
def test_a_missing_object_is_corrupt_by_column_array_and_shard(
    tmp_path: Path, teacher: dict, make_rows, lay, where: str
):
    root = str(tmp_path / "caches") if where == "local" else f"memory://{uuid4().hex}/caches"
    store = create_store(root, teacher)
    selection = lay(store, make_rows(LENGTHS))
    shard = shard_of(selection, 4)
    store.objects.remove(f"arrays.zarr/shards/{shard}/tokens/ids/c.0")
    reader = Reader(store, selection, ["tokens"])
    with pytest.raises(CorruptError, match=f"column tokens, array ids, shard {shard}, in .*: its object is missing"):
        reader.rows(range(len(LENGTHS)))
    assert len(reader.row(0)["tokens"]["ids"]) == LENGTHS[0]


def test_an_object_that_is_removed_while_it_is_read_is_corrupt(store: Store, make_rows, lay, monkeypatch):
    monkeypatch.setattr("coldstill.cache.array_object.SMALL_OBJECT_BYTES", 0)
    monkeypatch.setattr("coldstill.cache.reader.CHUNK_CACHE_BYTES", 0)
    selection = lay(store, make_rows(LENGTHS))
    reader = Reader(store, selection, ["tokens"])
    reader.row(7)
    reader.row(0)  # so that nothing is remembered of row 7 but where its chunks are
    store.objects.remove(f"arrays.zarr/shards/{shard_of(selection, 7)}/tokens/ids/c.0")
    with pytest.raises(CorruptError, match="column tokens, array ids, shard .* its object is missing"):
        reader.row(7)


@pytest.mark.usefixtures("_object_sizes")
@pytest.mark.parametrize("where", ["local", "remote"])
def test_rows_of_a_batch_are_the_rows_one_by_one(
    tmp_path: Path, teacher: dict, every_axis: Column, make_rows, lay, write_shards, where: str
):
    root = str(tmp_path / "caches") if where == "local" else f"memory://{uuid4().hex}/caches"
    store = create_store(root, teacher)
    selection = lay(store, make_rows(LENGTHS))
    write_shards(store, Manifest(store), selection.shard_names, every_axis)
    columns = ["tokens", every_axis.name]
    single = Reader(store, selection, columns)
    for indices in (range(len(LENGTHS)), [8, 0, 7, 7, 3], [4], []):
        rows = Reader(store, selection, columns).rows(indices)
        assert len(rows) == len(indices)
        for index, row in zip(indices, rows, strict=True):
            assert list(row) == columns
            for column, arrays in single.row(index).items():
                assert row[column].keys() == arrays.keys()
                for name, values in arrays.items():
                    assert row[column][name].dtype == values.dtype
                    np.testing.assert_array_equal(row[column][name], values)


def test_a_batch_is_fetched_in_one_request_for_the_indices_and_one_for_the_chunks(
    store: Store, every_axis: Column, make_rows, lay, write_shards, monkeypatch
):
    selection = lay(store, make_rows(LENGTHS))
    write_shards(store, Manifest(store), selection.shard_names, every_axis)
    everything = range(len(LENGTHS))
    objects = CountingObjects(store.path)
    reader = Reader(Store(objects, store.teacher), selection, ["tokens", every_axis.name])
    objects.forget()
    reader.rows(everything)
    num_arrays = len(selection.shard_names) * (1 + len(every_axis.arrays))
    assert (objects.num_requests, objects.num_ranges) == (1, num_arrays), "small objects come with their index"
    monkeypatch.setattr("coldstill.cache.array_object.SMALL_OBJECT_BYTES", 0)
    objects = CountingObjects(store.path)
    reader = Reader(Store(objects, store.teacher), selection, ["tokens", every_axis.name])
    objects.forget()
    reader.rows(everything)
    assert objects.num_requests == 2
    assert objects.num_ranges > num_arrays
    reader.rows(everything)
    assert objects.num_requests == 2


def test_of_a_large_object_only_the_index_and_the_chunks_of_the_row_are_read(store: Store, monkeypatch, fill):
    column = Column("hidden/1", {"values": ArraySpec("float32", (16,))})
    monkeypatch.setattr("coldstill.cache.array_object.SMALL_OBJECT_BYTES", 0)
    size = {"num_tokens": 1000, "num_rows": 10}
    record = write_column(store, Manifest(store), "s0", column, fill(column, **size), **size)
    ten = np.arange(10, dtype="int32")
    selection = Selection("x", ["s0"], ten * 0, ten, ten * 100, ten * 0 + 100, *unsaid(10), {})
    objects = CountingObjects(store.path)
    reader = Reader(Store(objects, store.teacher), selection, ["hidden/1"])
    objects.forget()
    reader.row(3)
    index_bytes = 1000 * 16 + 4
    assert index_bytes < objects.num_bytes < index_bytes + (record.stored_bytes - index_bytes) / 9


@pytest.mark.usefixtures("_object_sizes")
def test_what_is_done_to_a_row_never_changes_what_is_read_later(
    store: Store, every_axis: Column, make_rows, lay, write_shards
):
    selection = lay(store, make_rows(LENGTHS))
    write_shards(store, Manifest(store), selection.shard_names, every_axis)
    reader = Reader(store, selection, [every_axis.name])
    for _ in range(2):
        for index, row in enumerate(reader.rows(range(len(LENGTHS)))):
            for name, expected in Reader(store, selection, [every_axis.name]).row(index)[every_axis.name].items():
                np.testing.assert_array_equal(row[every_axis.name][name], expected)
                with contextlib.suppress(ValueError):  # a view that refuses it is as good as a copy
                    row[every_axis.name][name][...] = 0


@pytest.mark.parametrize("indices", [[1, 7, 4], [9, 0], [3, 3, 2, 5], range(10)], ids=str)
def test_rows_far_apart_in_one_array_read_back(store: Store, fill, indices: Sequence[int]):
    column = Column("hidden/1", {"values": ArraySpec("float32", (16,))})
    size = {"num_tokens": 100, "num_rows": 10}
    values = fill(column, **size)
    write_column(store, Manifest(store), "s0", column, values, **size)
    ten = np.arange(10, dtype="int32")
    selection = Selection("x", ["s0"], ten * 0, ten, ten * 10, ten * 0 + 10, *unsaid(10), {})
    reader = Reader(store, selection, ["hidden/1"])
    reader.row(4)
    for index, row in zip(indices, reader.rows(indices), strict=True):
        np.testing.assert_array_equal(row["hidden/1"]["values"], values["values"][10 * index : 10 * index + 10])


def test_of_the_tokens_only_the_ids_are_read(store: Store, make_rows, lay):
    selection = lay(store, make_rows(LENGTHS))
    assert list(Reader(store, selection, ["tokens"]).row(0)["tokens"]) == ["ids"]


def test_a_reader_knows_the_records_of_its_columns_alone(
    store: Store, every_axis: Column, make_rows, lay, write_shards
):
    selection = lay(store, make_rows(LENGTHS))
    write_shards(store, Manifest(store), selection.shard_names, every_axis)
    assert Reader(store, selection, [every_axis.name]).manifest.columns() == [every_axis.name]


@pytest.mark.parametrize(
    ("limit", "value"), [("CHUNK_CACHE_BYTES", 130), ("CHUNK_CACHE_BYTES", 0), ("OPEN_COLUMNS", 1)]
)
def test_a_reader_that_forgets_still_reads_right(store: Store, make_rows, lay, monkeypatch, limit: str, value: int):
    monkeypatch.setattr(f"coldstill.cache.reader.{limit}", value)
    monkeypatch.setattr("coldstill.cache.array_object.SMALL_OBJECT_BYTES", 0)
    rows = make_rows(LENGTHS)
    lay(store, rows)
    objects = CountingObjects(store.path)
    reader = Reader(Store(objects, store.teacher), select(store, rows), ["tokens"])
    assert_rows(reader, rows)
    once = objects.num_ranges
    assert_rows(reader, rows)
    assert objects.num_ranges > once, "nothing was forgotten, so the memory is not bounded"
    for row, read in zip(rows, reader.rows(range(len(rows))), strict=True):
        np.testing.assert_array_equal(read["tokens"]["ids"], row)


@pytest.mark.parametrize(("limit", "num_remembered"), [(0, 1), (64, 1), (130, 2), (64 * 4, 4)])
def test_of_chunks_as_many_are_remembered_as_the_memory_holds_the_last_ones_and_never_none(
    store: Store, fill, monkeypatch, limit: int, num_remembered: int
):
    """Sixteen rows, each of them a chunk of 64 bytes."""
    monkeypatch.setattr("coldstill.cache.reader.CHUNK_CACHE_BYTES", limit)
    monkeypatch.setattr("coldstill.cache.array_object.SMALL_OBJECT_BYTES", 0)
    column = Column("hidden/1", {"values": ArraySpec("float32")})
    write_column(
        store, Manifest(store), "s0", column, fill(column, num_tokens=256, num_rows=16), num_tokens=256, num_rows=16
    )
    each = np.arange(16, dtype="int32")
    selection = Selection("x", ["s0"], each * 0, each, each * 16, each * 0 + 16, *unsaid(len(each)), {})
    objects = CountingObjects(store.path)
    reader = Reader(Store(objects, store.teacher), selection, ["hidden/1"])
    for index in range(16):
        reader.row(index)
    read = []
    for index in reversed(range(16)):
        before = objects.num_ranges
        reader.row(index)
        read.append(objects.num_ranges - before)
        if read[-1]:
            break
    assert read == [0] * num_remembered + [1]


def test_of_indices_as_many_are_remembered_as_are_allowed(store: Store, make_rows, lay, monkeypatch):
    """A shard for each row: whoever comes back to the first has forgotten it where two are allowed."""
    monkeypatch.setattr("coldstill.cache.array_object.SMALL_OBJECT_BYTES", 0)
    rows = make_rows([9, 9, 9])
    selection = lay(store, rows)
    assert len(selection.shard_names) == 3
    found = []
    for allowed in (2, 3):
        monkeypatch.setattr("coldstill.cache.reader.OPEN_COLUMNS", allowed)
        objects = CountingObjects(store.path)
        reader = Reader(Store(objects, store.teacher), selection, ["tokens"])
        for index in (0, 1, 2):
            reader.row(index)
        before = objects.num_ranges
        reader.row(0)
        found.append(objects.num_ranges - before)
    assert found == [1, 0], "an index was read again, the chunk was not"


def test_a_chunk_that_is_remembered_is_not_read_again(store: Store, make_rows, lay):
    rows = make_rows(LENGTHS)
    lay(store, rows)
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
def test_a_store_opens_in_a_forked_worker_after_its_parent_has_read_it(store: Store, make_rows, lay):
    rows = make_rows(LENGTHS)
    lay(store, rows)
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


def test_what_a_large_batch_leaves_in_memory_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch, make_rows, lay):
    monkeypatch.setattr("coldstill.cache.reader.CHUNK_CACHE_BYTES", 1 << 16)
    monkeypatch.setattr("coldstill.cache.reader.BLOCK_BYTES", 1 << 14)
    monkeypatch.setattr("coldstill.cache.laying.SHARD_TOKENS", 1 << 15)
    monkeypatch.setattr("coldstill.cache.columns.CHUNK_TARGET_BYTES", 1 << 12)
    selection = lay(store, make_rows([512] * 60))
    column = Column("hidden/1/float32", {"values": ArraySpec("float32", (8,))})
    values = {"values": np.zeros((512 * 60, 8), np.float32)}
    write_column(store, Manifest(store), selection.shard_names[0], column, values, num_tokens=512 * 60, num_rows=60)
    reader = Reader(store, selection, [column.name])
    reader.row(0)
    tracemalloc.start()
    try:
        assert sum(row[column.name]["values"].nbytes for row in reader.rows(range(60))) == values["values"].nbytes
        left, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert left < (1 << 16) + (1 << 14) + 100_000 < values["values"].nbytes


@pytest.mark.usefixtures("_object_sizes")
def test_several_threads_read_the_rows_that_one_does(store: Store, make_rows, lay, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("coldstill.cache.reader.CHUNK_CACHE_BYTES", 600)
    monkeypatch.setattr("coldstill.cache.reader.OPEN_COLUMNS", 2)
    rows = make_rows(LENGTHS)
    selection = lay(store, rows)
    order = np.random.default_rng(0).integers(len(rows), size=(200, 3)).tolist()
    reader = Reader(store, selection, ["tokens"])
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(reader.rows, order))
    for batch, indices in zip(found, order, strict=True):
        for row, index in zip(batch, indices, strict=True):
            np.testing.assert_array_equal(row["tokens"]["ids"], rows[index])
