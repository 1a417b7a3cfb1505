import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
from numcodecs.zstd import Zstd

from coldstill.cache.array_object import CRC_BYTES, INDEX_ENTRY_BYTES, ArrayObject, encode
from coldstill.cache.arrays import read_column
from coldstill.cache.columns import DTYPES, ArraySpec, Column
from coldstill.cache.errors import CorruptError
from coldstill.cache.manifest import CommitRecord, Manifest
from coldstill.cache.store import Store
from coldstill.cache.writer import write_column

SIZE = {"num_tokens": 37, "num_rows": 5}
DAMAGE = r"column logits/topk, array values, shard s0, in .* is corrupt: .*; run: coldstill cache repair"


@dataclass(frozen=True)
class Case:
    id: str
    spec: ArraySpec


CASES = [
    *(Case(f"{dtype} of tokens", ArraySpec(dtype)) for dtype in DTYPES),
    Case("tokens of three", ArraySpec("float16", (3,))),
    Case("tokens of two by three", ArraySpec("int16", (2, 3))),
    Case("tokens wider than a chunk", ArraySpec("float32", (50,))),
    Case("rows", ArraySpec("int32", (), "row")),
    Case("rows of four", ArraySpec("float64", (4,), "row")),
    Case("one number of the shard", ArraySpec("float32", (1,), "shard")),
    Case("a vector of the shard", ArraySpec("uint16", (100,), "shard")),
    Case("a matrix of the shard", ArraySpec("float32", (9, 7), "shard")),
]


def random_values(spec: ArraySpec) -> np.ndarray:
    shape = spec.full_shape(**SIZE)
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "f":
        return np.random.default_rng(1).standard_normal(shape).astype(dtype)
    limits = np.iinfo(dtype)
    return np.random.default_rng(1).integers(limits.min, limits.max, shape, dtype, endpoint=True)


def opened(data: bytes, spec: ArraySpec, shape: tuple[int, ...]) -> ArrayObject:
    """Open an encoded array that has its index."""
    array = ArrayObject(spec=spec, shape=shape, num_bytes=len(data), label="it")
    start, num_bytes = array.index_range
    array.take_index(data[start : start + num_bytes])
    return array


def decode(data: bytes, spec: ArraySpec, shape: tuple[int, ...]) -> np.ndarray:
    array = opened(data, spec, shape)
    chunks = []
    for number in range(array.num_chunks):
        start, num_bytes = array.chunk_range(number)
        chunks.append(array.empty(1))
        array.decode(number, data[start : start + num_bytes], chunks[-1])
    return np.concatenate(chunks)[: shape[0]]


@pytest.fixture(params=["at once", "by index and chunks"])
def _small_and_large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let objects be read both as small ones and as large ones."""
    if request.param == "by index and chunks":
        monkeypatch.setattr("coldstill.cache.array_object.SMALL_OBJECT_BYTES", 0)


@dataclass(frozen=True)
class Written:
    """A column of several chunks on disk."""

    file: Path
    data: bytes
    values: np.ndarray
    read: Callable[[], np.ndarray]


@pytest.fixture
def written(store: Store, small_chunks: None, _small_and_large: None) -> Written:
    spec = ArraySpec("float32", (3,))
    column = Column("logits/topk", {"values": spec})
    values = random_values(spec)
    record = write_column(store, Manifest(store), "s0", column, {"values": values}, **SIZE)
    file = Path(store.path, "arrays.zarr/shards/s0/logits/topk/values/c.0.0")
    return Written(file, file.read_bytes(), values, lambda: read_column(store, record)["values"])


@pytest.mark.usefixtures("small_chunks", "_small_and_large")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_an_array_reads_back_as_it_was_written(case: Case):
    values = random_values(case.spec)
    read = decode(encode(values, case.spec), case.spec, values.shape)
    assert read.dtype == values.dtype
    np.testing.assert_array_equal(read, values)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33])
def test_an_array_about_as_long_as_its_chunks_reads_back(length: int):
    spec = ArraySpec("int32")
    values = np.arange(length, dtype="int32")
    assert spec.chunk_length(length) == min(length, 16)
    np.testing.assert_array_equal(decode(encode(values, spec), spec, values.shape), values)


def test_every_bit_of_a_float_is_kept():
    values = np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0, 5e-324], "float64")
    values = np.append(values, np.array([0x7FF0000000000001], "uint64").view("float64"))
    spec = ArraySpec("float64")
    assert decode(encode(values, spec), spec, values.shape).tobytes() == values.tobytes()


def test_an_array_in_another_memory_order_encodes_to_the_same_bytes():
    spec = ArraySpec("float32", (4,))
    values = np.arange(40, dtype="float32").reshape(10, 4)
    assert encode(np.asfortranarray(values), spec) == encode(values, spec)
    assert encode(values.astype(">f4"), spec) == encode(values, spec)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_zarr_alone_opens_what_was_written(store: Store, case: Case):
    values = random_values(case.spec)
    column = Column("hidden/12/kind", {"values": case.spec}, {"block": 12})
    write_column(store, Manifest(store), "s0", column, {"values": values}, **SIZE)
    root = zarr.open_group(f"{store.path}/arrays.zarr", mode="r")
    array = root["shards/s0/hidden/12/kind/values"]
    assert array.dtype == values.dtype
    assert array.shape == values.shape
    assert array.metadata.dimension_names == case.spec.dimension_names()
    np.testing.assert_array_equal(array[:], values)
    np.testing.assert_array_equal(array[1:3], values[1:3])
    attributes = dict(root["shards/s0/hidden/12/kind"].attrs)
    assert attributes.pop("coldstill")["column"] == "hidden/12/kind"
    assert attributes == {"block": 12}
    assert [name for name, _ in root["shards/s0/hidden"].groups()] == ["12"]


def test_a_small_object_is_read_at_once_and_a_large_one_by_parts(monkeypatch: pytest.MonkeyPatch):
    spec = ArraySpec("float32")
    values = np.random.default_rng(0).standard_normal(10_000).astype("float32")
    data = encode(values, spec)
    assert len(data) > 1 << 15
    large = opened(data, spec, values.shape)
    index_bytes = large.num_chunks * INDEX_ENTRY_BYTES + CRC_BYTES
    assert large.num_chunks > 2
    assert large.index_range == (len(data) - index_bytes, index_bytes)
    ranges = [large.chunk_range(number) for number in range(large.num_chunks)]
    assert ranges[0][0] == 0
    assert all(before[0] + before[1] == after[0] for before, after in itertools.pairwise(ranges))
    assert sum(num_bytes for _, num_bytes in ranges) == len(data) - index_bytes
    # One byte decides: an object of exactly the limit is still small.
    monkeypatch.setattr("coldstill.cache.array_object.SMALL_OBJECT_BYTES", len(data) - 1)
    assert opened(data, spec, values.shape).index_range == large.index_range
    monkeypatch.setattr("coldstill.cache.array_object.SMALL_OBJECT_BYTES", len(data))
    small = opened(data, spec, values.shape)
    assert small.index_range == (0, len(data))
    assert {small.chunk_range(number) for number in range(small.num_chunks)} == {(0, 0)}
    np.testing.assert_array_equal(decode(data, spec, values.shape), values)


@pytest.mark.parametrize("damage", ["fewer values", "more values", "no frame", "empty"])
def test_a_chunk_of_another_size_is_never_read_as_numbers(damage: str):
    """Hold even a chunk whose checksum is right against the array's shape."""
    spec = ArraySpec("uint16")
    data = {
        "fewer values": Zstd().encode(np.zeros(9, "uint16")),
        "more values": Zstd().encode(np.zeros(11, "uint16")),
        "no frame": b"no frame of zstd at all",
        "empty": b"",
    }[damage]
    chunk = data + int(google_crc32c.value(data)).to_bytes(4, "little")
    index = np.array([0, len(chunk)], "<u8").tobytes()
    written = chunk + index + int(google_crc32c.value(index)).to_bytes(4, "little")
    with pytest.raises(CorruptError, match="it is corrupt: chunk 0 "):
        decode(written, spec, (10,))


@pytest.mark.usefixtures("small_chunks")
def test_an_object_without_its_index_is_corrupt_even_where_its_record_gives_that_size():
    spec = ArraySpec("int8")
    values = np.zeros(6, "int8")
    data = encode(values, spec)[: -(INDEX_ENTRY_BYTES + CRC_BYTES)]
    with pytest.raises(CorruptError, match="it is corrupt: its object is cut short"):
        decode(data, spec, values.shape)


@pytest.mark.parametrize("num_values", [1, 100, 127, 128, 200, 300, 30_000, 32_767, 32_768, 40_000, 100_000])
def test_a_chunk_of_any_size_is_known_by_its_frame(num_values: int):
    spec = ArraySpec("float64", (num_values,), "shard")
    for values in (np.zeros(num_values), np.random.default_rng(0).standard_normal(num_values)):
        np.testing.assert_array_equal(decode(encode(values, spec), spec, values.shape), values)


def test_zarr_metadata_is_what_zarr_itself_would_make_of_it(store: Store):
    spec = ArraySpec("float16", (3,))
    column = Column("hidden/1", {"values": spec})
    write_column(store, Manifest(store), "s0", column, {"values": random_values(spec)}, **SIZE)
    array = zarr.open_array(f"{store.path}/arrays.zarr/shards/s0/hidden/1/values", mode="r")
    assert array.nchunks == array.nchunks_initialized == 1
    assert (array.shards, array.chunks) == ((37, 3), (37, 3))


def test_a_flipped_byte_is_never_read_as_a_number(written: Written):
    assert len(written.data) > 200
    chosen = random.Random(0)
    for position in chosen.sample(range(len(written.data)), 200):
        damaged = bytearray(written.data)
        damaged[position] ^= chosen.randrange(1, 256)
        written.file.write_bytes(damaged)
        with pytest.raises(CorruptError, match=DAMAGE):
            written.read()
    written.file.write_bytes(written.data)
    np.testing.assert_array_equal(written.read(), written.values)


@pytest.mark.parametrize("where", ["the index", "chunk 0"])
def test_a_flipped_byte_is_said_to_fail_its_checksum(written: Written, where: str):
    damaged = bytearray(written.data)
    damaged[-10 if where == "the index" else 10] ^= 1
    written.file.write_bytes(damaged)
    with pytest.raises(CorruptError, match=f"{where} fails its crc32c"):
        written.read()


def test_an_object_cut_short_is_never_read_as_numbers(written: Written):
    for length in range(len(written.data)):
        written.file.write_bytes(written.data[:length])
        with pytest.raises(CorruptError, match=DAMAGE):
            written.read()


def test_an_object_that_lost_its_beginning_is_never_read_as_numbers(written: Written):
    for length in range(1, len(written.data)):
        written.file.write_bytes(written.data[length:])
        with pytest.raises(CorruptError, match=DAMAGE):
            written.read()


def test_an_empty_object_is_said_to_be_cut_short(written: Written):
    written.file.write_bytes(b"")
    with pytest.raises(CorruptError, match="its object is cut short"):
        written.read()


def test_an_object_of_zeros_is_not_an_array_of_zeros(written: Written):
    written.file.write_bytes(bytes(len(written.data)))
    with pytest.raises(CorruptError, match=DAMAGE):
        written.read()


def test_a_deleted_object_does_not_read_as_zeros(written: Written):
    written.file.unlink()
    with pytest.raises(CorruptError, match=DAMAGE) as caught:
        written.read()
    assert "its object is missing" in str(caught.value)


def test_a_column_whose_object_is_gone_keeps_its_record(store: Store, written: Written):
    written.file.unlink()
    assert isinstance(Manifest(store).record("s0", "logits/topk"), CommitRecord)
