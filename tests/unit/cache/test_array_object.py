import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import zarr

from cache.array_object import ArrayObject, encode
from cache.columns import DTYPES, ArraySpec, Column
from cache.errors import CorruptError
from cache.manifest import CommitRecord, Manifest
from cache.reader import read_column
from cache.store import Store
from cache.writer import write_column

SIZE = {"num_tokens": 37, "num_rows": 5}
DAMAGE = r"column logits/topk, array values, shard s0, in .* is corrupt: .*; delete the store and run precompute again"


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


def decode(data: bytes, spec: ArraySpec, shape: tuple[int, ...]) -> np.ndarray:
    def read_range(start: int, num_bytes: int) -> bytes:
        start = max(start + len(data), 0) if start < 0 else start
        return data[start : start + num_bytes]

    array = ArrayObject(read_range, spec=spec, shape=shape, label="it")
    return np.concatenate([array.chunk(number) for number in range(-(-shape[0] // array.chunk_length))])


@dataclass(frozen=True)
class Written:
    """A column of several chunks on disk."""

    file: Path
    data: bytes
    values: np.ndarray
    read: Callable[[], np.ndarray]


@pytest.fixture
def written(store: Store, small_chunks: None) -> Written:
    spec = ArraySpec("float32", (3,))
    column = Column("logits/topk", {"values": spec})
    values = random_values(spec)
    record = write_column(store, Manifest(store), "s0", column, {"values": values}, **SIZE)
    file = Path(store.path, "arrays.zarr/shards/s0/logits/topk/values/c/0/0")
    return Written(file, file.read_bytes(), values, lambda: read_column(store, record)["values"])


@pytest.mark.usefixtures("small_chunks")
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
    assert dict(root["shards/s0/hidden/12/kind"].attrs) == {"block": 12}
    assert [name for name, _ in root["shards/s0/hidden"].groups()] == ["12"]


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
