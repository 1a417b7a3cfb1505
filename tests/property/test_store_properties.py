"""Whatever the rows, the size of shards and chunks, and the order of work: what is read is what was written."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock
from uuid import uuid4

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from cache.array_object import ArrayObject, encode
from cache.columns import DTYPES, ArraySpec, Column
from cache.errors import CorruptError
from cache.identity import row_id
from cache.manifest import Manifest
from cache.reader import Reader
from cache.rows import find_rows, lay_rows, publish_rows, read_selection, shard_rows, write_selection
from cache.store import Store, create_store, open_store
from cache.writer import write_column

TEACHER = {"identity": {"config": "c0", "weights": "w0", "dtype": "float32"}}
COLUMN = Column(
    "hidden/3",
    {
        "ids": ArraySpec("uint16"),
        "squares": ArraySpec("float32", (2,)),
        "first_and_length": ArraySpec("int32", (2,), "row"),
        "num_rows": ArraySpec("uint32", (1,), "shard"),
    },
)

token_rows = st.lists(st.integers(0, 65_535), min_size=1, max_size=30).map(tuple)
shard_tokens = st.integers(1, 60)
chunk_bytes = st.sampled_from([1, 8, 16, 64, 256, 1 << 18])


@contextmanager
def new_store(*, shard_tokens: int, chunk_bytes: int = 1 << 18) -> Iterator[Store]:
    """Create a store in memory with shards and chunks of those sizes."""
    root = f"memory://{uuid4().hex}"
    with (
        mock.patch("cache.rows.SHARD_TOKENS", shard_tokens),
        mock.patch("cache.columns._CHUNK_TARGET_BYTES", chunk_bytes),
    ):
        yield create_store(root, TEACHER)
    fsspec.filesystem("memory").rm(root, recursive=True)


def column_values(members: list[tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Give the column of a shard that holds these rows."""
    ids = np.concatenate([np.array(row, "uint16") for row in members])
    real = ids.astype("float32")
    return {
        "ids": ids,
        "squares": np.stack([real, real**2], axis=1),
        "first_and_length": np.array([(row[0], len(row)) for row in members], "int32"),
        "num_rows": np.array([len(members)], "uint32"),
    }


def assert_row(read: dict[str, np.ndarray], row: tuple[int, ...]) -> None:
    real = np.array(row, "float32")
    assert read["ids"].tolist() == list(row)
    np.testing.assert_array_equal(read["squares"], np.stack([real, real**2], axis=1))
    assert read["first_and_length"].tolist() == [row[0], len(row)]


def ids_of(rows: list[tuple[int, ...]]) -> list[bytes]:
    return [row_id(np.array(row)) for row in rows]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.lists(token_rows, min_size=1, max_size=12), shard_tokens, chunk_bytes)
def test_rows_read_back_as_they_were_written(data, rows, shard_tokens: int, chunk_bytes: int):
    with new_store(shard_tokens=shard_tokens, chunk_bytes=chunk_bytes) as store:
        by_id = dict(zip(ids_of(rows), rows, strict=True))
        publish_rows(store, lay_rows(store, ids_of(rows), [len(row) for row in rows]))
        selection = write_selection(store, find_rows(store, ids_of(rows)), [len(row) - 1 for row in rows], {"n": 1})
        manifest = Manifest(store)
        for shard in data.draw(st.permutations(selection.shard_names()), label="order of completion"):
            members = [by_id[row] for row in shard_rows(store, [shard])[shard]["row"].to_pylist()]
            size = {"num_tokens": sum(map(len, members)), "num_rows": len(members)}
            write_column(store, manifest, shard, COLUMN, column_values(members), **size)
            if data.draw(st.booleans(), label="compact"):
                manifest.compact()
        reader = Reader(open_store(store.path), read_selection(store, selection.name), [COLUMN.name])
        assert len(reader) == len(rows)
        for index in data.draw(st.permutations(range(len(rows))), label="order of reading"):
            assert_row(reader.row(index)[COLUMN.name], rows[index])
            assert reader.selection.loss_starts[index] == len(rows[index]) - 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(token_rows, min_size=1, max_size=8), min_size=1, max_size=4), shard_tokens)
def test_rows_never_move_and_never_straddle_a_shard(batches, shard_tokens: int):
    with new_store(shard_tokens=shard_tokens) as store:
        places: dict[bytes, dict] = {}
        for rows in batches:
            ids = ids_of(rows)
            publish_rows(store, lay_rows(store, ids, [len(row) for row in rows]))
            for place in find_rows(store, ids).to_pylist():
                assert places.setdefault(place["row"], place) == place
        for place in find_rows(store, list(places)).to_pylist():
            assert place == places[place["row"]]
        for table in shard_rows(store, list({place["shard"] for place in places.values()})).values():
            lengths = table["length"].to_pylist()
            assert table["position"].to_pylist() == list(range(len(table)))
            assert table["start"].to_pylist() == [sum(lengths[:position]) for position in range(len(table))]
            assert len(lengths) == 1 or sum(lengths) <= shard_tokens


@settings(max_examples=100, deadline=None)
@given(st.lists(token_rows, min_size=2, max_size=2, unique=True), st.sampled_from(["uint16", "int32", "int64"]))
def test_rows_share_an_id_only_when_their_tokens_are_equal(rows, dtype: str):
    first, second = rows
    assert row_id(np.array(first, dtype)) == row_id(np.array(first))
    assert row_id(np.array(first, dtype)) != row_id(np.array(second, dtype))


@st.composite
def specs_and_values(draw: st.DrawFn) -> tuple[ArraySpec, np.ndarray]:
    shape = draw(st_numpy.array_shapes(max_dims=3, max_side=12))
    axis = draw(st.sampled_from(["token", "row", "shard"]))
    dtype = draw(st.sampled_from(DTYPES))
    return ArraySpec(dtype, shape if axis == "shard" else shape[1:], axis), draw(st_numpy.arrays(dtype, shape))


def open_bytes(data: bytes, spec: ArraySpec, shape: tuple[int, ...]) -> ArrayObject:
    def read_range(start: int, num_bytes: int) -> bytes:
        start = max(start + len(data), 0) if start < 0 else start
        return data[start : start + num_bytes]

    return ArrayObject(read_range, spec=spec, shape=shape, label="the array")


def read_all(data: bytes, spec: ArraySpec, shape: tuple[int, ...]) -> np.ndarray:
    array = open_bytes(data, spec, shape)
    return np.concatenate([array.chunk(number) for number in range(-(-shape[0] // array.chunk_length))])


@settings(max_examples=100, deadline=None)
@given(specs_and_values(), chunk_bytes)
def test_any_array_keeps_every_bit(spec_and_values, chunk_bytes: int):
    spec, values = spec_and_values
    with mock.patch("cache.columns._CHUNK_TARGET_BYTES", chunk_bytes):
        read = read_all(encode(values, spec), spec, values.shape)
    assert (read.dtype, read.shape, read.tobytes()) == (values.dtype, values.shape, values.tobytes())


@settings(max_examples=150, deadline=None)
@given(st.data(), specs_and_values(), chunk_bytes)
def test_no_damage_to_one_byte_or_to_the_length_is_read_as_numbers(data, spec_and_values, chunk_bytes: int):
    spec, values = spec_and_values
    with mock.patch("cache.columns._CHUNK_TARGET_BYTES", chunk_bytes):
        encoded = encode(values, spec)
        position = data.draw(st.integers(0, len(encoded) - 1), label="position")
        flipped = encoded[position] ^ data.draw(st.integers(1, 255), label="flip")
        for damaged in (encoded[:position] + bytes([flipped]) + encoded[position + 1 :], encoded[:position]):
            with pytest.raises(CorruptError, match="the array is corrupt"):
                read_all(damaged, spec, values.shape)
