"""Whatever the rows, the size of shards and chunks, and the order of work: what is read is what was written."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock
from uuid import uuid4

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import store_rows
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from coldstill.cache.array_object import ArrayObject, encode
from coldstill.cache.arrays import read_column
from coldstill.cache.columns import DTYPES, ArraySpec, Column
from coldstill.cache.errors import CorruptError
from coldstill.cache.identity import row_id
from coldstill.cache.laying import lay_rows
from coldstill.cache.manifest import Manifest
from coldstill.cache.reader import Reader
from coldstill.cache.row_lines import RowLines
from coldstill.cache.rows import compact_rows, read_rows, split_shards
from coldstill.cache.selections import read_selection, write_selection
from coldstill.cache.spans import Span
from coldstill.cache.store import Store, create_store, open_store
from coldstill.cache.tokens import TOKENS, rows_of_tokens
from coldstill.cache.writer import write_column

TEACHER = {"identity": {"config": "c0", "weights": "w0", "dtype": "float32"}}
ARRAYS = {
    "ids": ArraySpec("uint16"),
    "squares": ArraySpec("float32", (2,)),
    "first_and_length": ArraySpec("int32", (2,), "row"),
    "num_rows": ArraySpec("uint32", (1,), "shard"),
}
COLUMN = Column("hidden/3", ARRAYS)
# Fewer arrays for what is asked of the columns together.
NARROW = {"first_and_length": ARRAYS["first_and_length"], "ids": ARRAYS["ids"]}
COLUMNS = [Column(name, NARROW, {"name": name}) for name in ("hidden/3", "hidden/30/int8", "logits")]

Row = tuple[int, ...]

token_rows = st.lists(st.integers(0, 65_535), min_size=1, max_size=30).map(tuple)
shard_tokens = st.integers(1, 60)
chunk_bytes = st.sampled_from([1, 8, 16, 64, 256, 1 << 18])
small_objects = st.sampled_from([0, 200, 1 << 15])
fold_every = st.integers(1, 6)


@contextmanager
def new_store(
    *, shard_tokens: int, chunk_bytes: int = 1 << 18, small_objects: int = 1 << 15, fold_every: int = 1024
) -> Iterator[Store]:
    """Create a store in memory with shards, chunks, small objects and folds of those sizes."""
    root = f"memory://{uuid4().hex}"
    with (
        mock.patch("coldstill.cache.laying.SHARD_TOKENS", shard_tokens),
        mock.patch("coldstill.cache.columns.CHUNK_TARGET_BYTES", chunk_bytes),
        mock.patch("coldstill.cache.array_object.SMALL_OBJECT_BYTES", small_objects),
        mock.patch("coldstill.cache.manifest.FOLD_EVERY", fold_every),
    ):
        yield create_store(root, TEACHER)
    fsspec.filesystem("memory").rm(root, recursive=True)


def column_values(members: list[Row]) -> dict[str, np.ndarray]:
    """Give the column of a shard that holds these rows."""
    ids = np.concatenate([np.array(row, "uint16") for row in members])
    real = ids.astype("float32")
    return {
        "ids": ids,
        "squares": np.stack([real, real**2], axis=1),
        "first_and_length": np.array([(row[0], len(row)) for row in members], "int32"),
        "num_rows": np.array([len(members)], "uint32"),
    }


def assert_row(read: dict[str, np.ndarray], row: Row) -> None:
    real = np.array(row, "float32")
    assert read["ids"].tolist() == list(row)
    assert read["first_and_length"].tolist() == [row[0], len(row)]
    if "squares" in read:
        np.testing.assert_array_equal(read["squares"], np.stack([real, real**2], axis=1))


def arrays_of(rows: Sequence[Row]) -> list[np.ndarray]:
    return [np.array(row) for row in rows]


def ids_of(rows: Sequence[Row]) -> list[bytes]:
    return store_rows.ids_of(arrays_of(rows))


def register(store: Store, rows: Sequence[Row], *, manifest: Manifest | None = None) -> RowLines:
    """Lay rows, commit their tokens, make them known, and give their places."""
    return store_rows.register(store, arrays_of(rows), manifest)


def write_shard(store: Store, manifest: Manifest, shard: str, column: Column, by_id: dict[bytes, Row]) -> None:
    members = [by_id[row] for row in store_rows.shard_rows(store, [shard])[shard]["row"].to_pylist()]
    size = {"num_tokens": sum(map(len, members)), "num_rows": len(members)}
    values = column_values(members)
    write_column(store, manifest, shard, column, {name: values[name] for name in column.arrays}, **size)


def files_of(store: Store) -> dict[str, bytes]:
    return {name: store.objects.read(name) for name in store.objects.sizes("")}


@settings(max_examples=30, deadline=None)
@given(
    st.data(),
    st.lists(token_rows, min_size=1, max_size=12),
    shard_tokens,
    chunk_bytes,
    small_objects,
    fold_every,
)
def test_rows_read_back_as_they_were_written(
    data, rows, shard_tokens: int, chunk_bytes: int, small_objects: int, fold_every: int
):
    sizes = {"chunk_bytes": chunk_bytes, "small_objects": small_objects, "fold_every": fold_every}
    with new_store(shard_tokens=shard_tokens, **sizes) as store:
        by_id = dict(zip(ids_of(rows), rows, strict=True))
        manifest = Manifest(store)
        found = register(store, rows, manifest=manifest)
        spans = [(Span(0, len(row) - 1, 0.0),) if len(row) > 1 else () for row in rows]
        selection = write_selection(store, found, spans, {"n": 1})
        for shard in data.draw(st.permutations(selection.shard_names), label="order of completion"):
            write_shard(store, manifest, shard, COLUMN, by_id)
            if data.draw(st.booleans(), label="compact"):
                manifest.compact()
                compact_rows(store)
        reader = Reader(open_store(store.path), read_selection(store, selection.name), [COLUMN.name, TOKENS])
        assert len(reader) == len(rows)
        batch = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=15), label="batch")
        for index, read in zip(batch, reader.rows(batch), strict=True):
            assert_row(read[COLUMN.name], rows[index])
            assert read[TOKENS]["ids"].tolist() == list(rows[index])
        for index in data.draw(st.permutations(range(len(rows))), label="order of reading"):
            assert_row(reader.row(index)[COLUMN.name], rows[index])
            assert reader.selection.spans[index] == spans[index]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(token_rows, min_size=1, max_size=8), min_size=1, max_size=4), shard_tokens)
def test_rows_never_move_and_never_straddle_a_shard(batches, shard_tokens: int):
    with new_store(shard_tokens=shard_tokens) as store:
        places: dict[bytes, dict] = {}
        for rows in batches:
            for place in register(store, rows).table().to_pylist():
                assert places.setdefault(place["row"], place) == place
        known = read_rows(store)
        every = list(dict.fromkeys(row for rows in batches for row in rows))
        for place in store_rows.found_rows(store, arrays_of(every)).table().to_pylist():
            assert place == places[place["row"]]
        assert sorted(places) == sorted(known["row"].to_pylist()), "a row is known twice"
        for table in split_shards(known).values():
            lengths = table["length"].to_pylist()
            assert table["position"].to_pylist() == list(range(len(table)))
            assert table["start"].to_pylist() == [sum(lengths[:position]) for position in range(len(table))]
            assert len(lengths) == 1 or sum(lengths) <= shard_tokens


@settings(max_examples=25, deadline=None)
@given(st.data(), st.lists(token_rows, min_size=1, max_size=10, unique=True), shard_tokens)
def test_rows_are_rebuilt_from_tokens_and_laid_again_as_they_were(data, rows, shard_tokens: int):
    with new_store(shard_tokens=shard_tokens) as store:
        places = register(store, rows).table().to_pylist()
        known, manifest = read_rows(store), Manifest(store)
        rebuilt = [rows_of_tokens(record, read_column(store, record)) for record in manifest.records()]
        assert pa.concat_tables(lines.table() for lines in rebuilt).to_pylist() == known.to_pylist()
        shards = list(split_shards(known))
        kept = data.draw(st.lists(st.sampled_from(shards), unique=True), label="shards that keep their tokens")
        asked = data.draw(st.permutations(rows), label="order of asking")
        laid = lay_rows(store_rows.known(store), kept, store_rows.wanted(arrays_of(asked))).rows.table()
        lost = [place for place in known.to_pylist() if place["shard"] not in kept]
        assert sorted(laid.to_pylist(), key=str) == sorted(lost, key=str)
        manifest.drop([(shard, TOKENS) for shard in set(shards) - set(kept)])
        register(store, asked)
        assert register(store, rows).table().to_pylist() == places


@st.composite
def recipes(draw: st.DrawFn, num_rows: int) -> tuple[list[int], list[Column]]:
    """Draw what a recipe asks for: which rows, and which columns of them."""
    rows = draw(st.lists(st.integers(0, num_rows - 1), min_size=1, max_size=num_rows, unique=True))
    return rows, draw(st.lists(st.sampled_from(COLUMNS), min_size=1, unique_by=lambda column: column.name))


def fulfil(store: Store, rows: Sequence[Row], jobs: Sequence[tuple[str, Column]]) -> None:
    """Write what is missing of some (shard, column) pairs, as one run does, and fold it at the end."""
    by_id = dict(zip(ids_of(rows), rows, strict=True))
    manifest = Manifest(store)
    register(store, rows, manifest=manifest)
    for shard, column in jobs:
        if (shard, column.name) not in manifest:
            write_shard(store, manifest, shard, column, by_id)
    manifest.compact()
    compact_rows(store)


@settings(max_examples=20, deadline=None, phases=[Phase.generate])  # to make an example smaller takes minutes
@given(st.data(), st.lists(token_rows, min_size=1, max_size=5, unique=True), shard_tokens, fold_every)
def test_two_recipes_one_after_another_end_in_the_bytes_of_both_together(
    data, rows, shard_tokens: int, fold_every: int
):
    with new_store(shard_tokens=shard_tokens) as store:
        shards = [place["shard"] for place in register(store, rows).table().to_pylist()]
    asked = [data.draw(recipes(len(rows)), label=label) for label in ("first recipe", "second recipe")]
    first, second = (
        [(shard, column) for shard in dict.fromkeys(shards[index] for index in indices) for column in columns]
        for indices, columns in asked
    )
    together = data.draw(st.permutations(list(dict.fromkeys([*_keys(first), *_keys(second)]))), label="order of work")
    by_name = {column.name: column for column in COLUMNS}
    ends = []
    for runs in ([first, second], [second, first], [[(shard, by_name[name]) for shard, name in together]]):
        with new_store(shard_tokens=shard_tokens, fold_every=fold_every) as store:
            for jobs in runs:
                fulfil(store, rows, jobs)
            committed = {(record.shard, record.column.name) for record in Manifest(store).records()}
            assert committed == {*_keys(first), *_keys(second)} | {(shard, TOKENS) for shard in shards}
            ends.append(files_of(store))
            for indices, columns in asked:
                found = register(store, [rows[index] for index in indices])
                selection = write_selection(store, found, [()] * len(indices), {})
                reader = Reader(store, selection, [column.name for column in columns])
                for index, read in zip(indices, reader.rows(range(len(indices))), strict=True):
                    for column in columns:
                        assert_row(read[column.name], rows[index])
    assert ends[0] == ends[1] == ends[2]


def _keys(jobs: Sequence[tuple[str, Column]]) -> list[tuple[str, str]]:
    return [(shard, column.name) for shard, column in jobs]


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


def read_all(data: bytes, spec: ArraySpec, shape: tuple[int, ...], *, num_bytes: int) -> np.ndarray:
    """Read an object that its record says is of that size, by ranges."""
    array = ArrayObject(spec=spec, shape=shape, num_bytes=num_bytes, label="the array")
    start, length = array.index_range
    array.take_index(data[start : start + length])
    chunks = array.empty(array.num_chunks)
    for number in range(array.num_chunks):
        start, length = array.chunk_range(number)
        place = slice(number * array.chunk_length, (number + 1) * array.chunk_length)
        array.decode(number, data[start : start + length], chunks[place])
    return chunks[: shape[0]]


@contextmanager
def array_sizes(chunk_bytes: int, small_objects: int) -> Iterator[None]:
    with (
        mock.patch("coldstill.cache.columns.CHUNK_TARGET_BYTES", chunk_bytes),
        mock.patch("coldstill.cache.array_object.SMALL_OBJECT_BYTES", small_objects),
    ):
        yield


@settings(max_examples=100, deadline=None)
@given(specs_and_values(), chunk_bytes, small_objects)
def test_any_array_keeps_every_bit(spec_and_values, chunk_bytes: int, small_objects: int):
    spec, values = spec_and_values
    with array_sizes(chunk_bytes, small_objects):
        encoded = encode(values, spec)
        read = read_all(encoded, spec, values.shape, num_bytes=len(encoded))
    assert (read.dtype, read.shape, read.tobytes()) == (values.dtype, values.shape, values.tobytes())


@settings(max_examples=120, deadline=None)
@given(st.data(), specs_and_values(), chunk_bytes, small_objects)
def test_no_damage_to_one_byte_or_to_the_length_is_read_as_numbers(
    data, spec_and_values, chunk_bytes: int, small_objects: int
):
    spec, values = spec_and_values
    with array_sizes(chunk_bytes, small_objects):
        encoded = encode(values, spec)
        position = data.draw(st.integers(0, len(encoded) - 1), label="position")
        flipped = encoded[position] ^ data.draw(st.integers(1, 255), label="flip")
        for damaged in (encoded[:position] + bytes([flipped]) + encoded[position + 1 :], encoded[:position]):
            with pytest.raises(CorruptError, match="the array is corrupt"):
                read_all(damaged, spec, values.shape, num_bytes=len(encoded))
