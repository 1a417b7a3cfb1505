"""Copies of remote arrays on the local disk: fetched once, held against their sha256, never stale."""

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from coldstill.cache.columns import Column
from coldstill.cache.errors import CorruptError
from coldstill.cache.local_copy import LocalCopy, StoredObject
from coldstill.cache.local_objects import LocalObjects
from coldstill.cache.manifest import CommitRecord, Manifest
from coldstill.cache.reader import Reader
from coldstill.cache.repair import drop_columns
from coldstill.cache.selections import Selection
from coldstill.cache.store import Store
from coldstill.cache.writer import write_column

LENGTHS = [4, 6, 9, 23, 2]

pytestmark = pytest.mark.usefixtures("small_chunks", "small_shards")


class CountingObjects(LocalObjects):
    """Objects that count how often each is read, whole or in part."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.reads: Counter[str] = Counter()

    def read(self, name: str) -> bytes:
        self.reads[name] += 1
        return super().read(name)

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        self.reads.update(name for name, _, _ in ranges)
        return super().read_ranges(ranges)

    @property
    def array_reads(self) -> dict[str, int]:
        return {name: count for name, count in self.reads.items() if name.startswith("arrays.zarr")}


@pytest.fixture
def selection(store: Store, make_rows, lay, write_shards, every_axis: Column) -> Selection:
    selection = lay(store, make_rows(LENGTHS))
    write_shards(store, Manifest(store), selection.shard_names, every_axis)
    return selection


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    return tmp_path / "copies"


def counted(store: Store) -> tuple[Store, CountingObjects]:
    objects = CountingObjects(store.path)
    return Store(objects, store.teacher), objects


def assert_rows_equal(first: Reader, second: Reader) -> None:
    assert len(first) == len(second)
    for index in range(len(first)):
        for column, arrays in second.row(index).items():
            assert first.row(index)[column].keys() == arrays.keys()
            for name, values in arrays.items():
                np.testing.assert_array_equal(first.row(index)[column][name], values)


def record_of(store: Store, selection: Selection, column: Column) -> CommitRecord:
    return Manifest(store).record(selection.shard_names[0], column.name)


def copy_of(copies: Path, record: CommitRecord, array: str) -> Path:
    sha256 = record.objects[array]["sha256"]
    return copies / sha256[:2] / sha256


def test_rows_read_through_copies_as_they_read_in_place(store, selection, copies, every_axis):
    columns = ["tokens", every_axis.name]
    assert_rows_equal(Reader(store, selection, columns, local_copy=str(copies)), Reader(store, selection, columns))


def test_each_object_is_fetched_once_and_then_read_from_its_copy(store, selection, copies, every_axis):
    remote, objects = counted(store)
    reader = Reader(remote, selection, [every_axis.name], local_copy=str(copies))
    for _ in range(2):
        reader.rows(range(len(reader)))
    num_arrays = len(selection.shard_names) * len(every_axis.arrays)
    assert len(objects.array_reads) == num_arrays
    assert set(objects.array_reads.values()) == {1}
    another, untouched = counted(store)
    Reader(another, selection, [every_axis.name], local_copy=str(copies)).rows(range(len(reader)))
    assert untouched.array_reads == {}


def test_only_what_is_read_is_fetched(store, selection, copies, every_axis):
    remote, objects = counted(store)
    Reader(remote, selection, [every_axis.name], local_copy=str(copies)).row(0)
    assert len(objects.array_reads) == len(every_axis.arrays)


def test_copies_are_named_by_the_sha256_of_the_commit_record(store, selection, copies, every_axis, tree):
    Reader(store, selection, [every_axis.name], local_copy=str(copies)).rows(range(len(selection)))
    expected = set()
    for shard in selection.shard_names:
        record = Manifest(store).record(shard, every_axis.name)
        expected |= {f"{entry['sha256'][:2]}/{entry['sha256']}" for entry in record.objects.values()}
    assert tree(copies).keys() == expected


def test_an_altered_object_is_corrupt_by_column_and_shard_and_never_kept(store, selection, copies, every_axis):
    record = record_of(store, selection, every_axis)
    file = Path(store.path, f"arrays.zarr/shards/{record.shard}/{every_axis.name}/scale/c.0")
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    reader = Reader(store, selection, [every_axis.name], local_copy=str(copies))
    message = f"column {every_axis.name}, array scale, shard {record.shard}, in .*: its object is not what was written"
    for _ in range(2):
        with pytest.raises(CorruptError, match=message):
            reader.row(0)
    assert not copy_of(copies, record, "scale").exists()
    file.write_bytes(good)
    assert_rows_equal(reader, Reader(store, selection, [every_axis.name]))


def test_a_missing_object_is_corrupt_by_column_and_shard(store, selection, copies, every_axis):
    shard = selection.shard_names[0]
    Path(store.path, f"arrays.zarr/shards/{shard}/{every_axis.name}/scale/c.0").unlink()
    reader = Reader(store, selection, [every_axis.name], local_copy=str(copies))
    with pytest.raises(CorruptError, match=f"column {every_axis.name}, array scale, shard {shard}.*object is missing"):
        reader.row(0)


@pytest.mark.parametrize("change", ["cut short", "too long", "empty"])
def test_a_copy_of_another_size_is_fetched_again(store, selection, copies, every_axis, change: str):
    Reader(store, selection, [every_axis.name], local_copy=str(copies)).rows(range(len(selection)))
    copy = copy_of(copies, record_of(store, selection, every_axis), "values")
    good = copy.read_bytes()
    copy.write_bytes({"cut short": good[:-1], "too long": good + b"x", "empty": b""}[change])
    reader = Reader(store, selection, [every_axis.name], local_copy=str(copies))
    assert_rows_equal(reader, Reader(store, selection, [every_axis.name]))
    assert copy.read_bytes() == good


def test_a_flipped_byte_of_a_copy_is_never_read_as_a_number(store, selection, copies, every_axis):
    Reader(store, selection, [every_axis.name], local_copy=str(copies)).row(0)
    copy = copy_of(copies, record_of(store, selection, every_axis), "scale")
    data = copy.read_bytes()
    for position in range(len(data)):
        copy.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(CorruptError, match=f"column {every_axis.name}, array scale, shard "):
            Reader(store, selection, [every_axis.name], local_copy=str(copies)).row(0)


def test_a_column_that_was_written_anew_is_never_read_from_an_old_copy(store, selection, copies, every_axis, fill):
    record = record_of(store, selection, every_axis)
    Reader(store, selection, [every_axis.name], local_copy=str(copies)).row(0)
    before = Reader(store, selection, [every_axis.name]).row(0)[every_axis.name]["values"]
    manifest = Manifest(store)
    drop_columns(store, manifest, [(record.shard, every_axis.name)])
    size = {"num_tokens": record.num_tokens, "num_rows": record.num_rows}
    write_column(store, manifest, record.shard, every_axis, fill(every_axis, **size, seed=77), **size)
    reader = Reader(store, selection, [every_axis.name], local_copy=str(copies))
    assert_rows_equal(reader, Reader(store, selection, [every_axis.name]))
    assert not np.array_equal(reader.row(0)[every_axis.name]["values"], before)


def test_two_objects_of_the_same_bytes_share_a_copy(tmp_path: Path, copies: Path, tree):
    source = CountingObjects(str(tmp_path / "source"))
    source.write_all({"a": b"same", "b": b"same"})
    sha256 = "0967115f2813a3541eaef77de9d9d5773f1c0c04314b0bbfe4ff3b3b1c55b5d5"
    copy = LocalCopy(str(copies), source)
    assert copy.fetch(StoredObject("a", 4, sha256)) == copy.fetch(StoredObject("b", 4, sha256))
    assert source.reads == {"a": 1}
    assert tree(copies) == {f"{sha256[:2]}/{sha256}": b"same"}


def test_the_copies_may_be_removed_while_a_reader_uses_them(store, selection, copies, every_axis, monkeypatch):
    monkeypatch.setattr("coldstill.cache.reader.CHUNK_CACHE_BYTES", 0)
    # Large objects: their chunks are read apart from their index.
    monkeypatch.setattr("coldstill.cache.array_object.SMALL_OBJECT_BYTES", 0)
    reader = Reader(store, selection, [every_axis.name], local_copy=str(copies))
    reader.rows(range(len(reader)))
    shutil.rmtree(copies)
    assert_rows_equal(reader, Reader(store, selection, [every_axis.name]))
