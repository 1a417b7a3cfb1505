"""Builders that the tests of `cache` share: a store, columns, values and rows."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from store_rows import register, shard_rows

from coldstill.cache.columns import ArraySpec, Column
from coldstill.cache.manifest import Manifest
from coldstill.cache.selections import Selection, write_selection
from coldstill.cache.store import CONSTANTS, Store, create_store
from coldstill.cache.writer import write_column

VOCAB_SIZE = 65_536
TEACHER = {"identity": {"config": "c0", "weights": "w0", "dtype": "float32"}, "model": "some/teacher"}

OUTPUT_HEAD = Column("output_head", {"weight": ArraySpec("float32", (3, 2), axis="shard")})

Values = dict[str, np.ndarray]


@pytest.fixture
def teacher() -> dict:
    return TEACHER


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return create_store(str(tmp_path / "caches"), TEACHER)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make chunks so short that a few tokens fill several."""
    monkeypatch.setattr("coldstill.cache.columns.CHUNK_TARGET_BYTES", 64)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a shard hold ten tokens."""
    monkeypatch.setattr("coldstill.cache.laying.SHARD_TOKENS", 10)


@pytest.fixture
def every_axis() -> Column:
    """A column with an array for each axis."""
    arrays = {
        "values": ArraySpec("float16", (3,)),
        "ids": ArraySpec("uint32"),
        "lengths": ArraySpec("int32", (2,), "row"),
        "scale": ArraySpec("float32", (5,), "shard"),
    }
    return Column("hidden/12/mixed", arrays, {"block": 12})


@pytest.fixture
def fill() -> Callable[..., Values]:
    """Give values for a column, decided by a seed."""

    def filled(column: Column, *, num_tokens: int, num_rows: int, seed: int = 0) -> Values:
        generator = np.random.default_rng(seed)
        values = {}
        for name, spec in column.arrays.items():
            shape = spec.full_shape(num_tokens=num_tokens, num_rows=num_rows)
            values[name] = (generator.standard_normal(shape) * 50 + 60).astype(spec.dtype)
        return values

    return filled


@pytest.fixture
def make_rows() -> Callable[..., list[np.ndarray]]:
    """Make rows of the lengths given; no two are equal, whatever their lengths, as each starts with its number."""

    def made(lengths: list[int], *, first: int = 0) -> list[np.ndarray]:
        return [np.arange(length, dtype=np.int64) * 7 + 1000 * (first + i) for i, length in enumerate(lengths)]

    return made


@pytest.fixture
def lay() -> Callable[..., Selection]:
    """Lay rows into a store, commit their tokens, publish them and select them in their order."""

    def laid(store: Store, rows: list[np.ndarray]) -> Selection:
        return write_selection(store, register(store, rows, vocab_size=VOCAB_SIZE), [()] * len(rows), {})

    return laid


@pytest.fixture
def write_shards(fill: Callable[..., Values]) -> Callable[..., dict[str, Values]]:
    """Write a column for some shards and give what was written, by shard."""

    def written(store: Store, manifest: Manifest, shards: list[str], column: Column) -> dict[str, Values]:
        values = {}
        for seed, (shard, table) in enumerate(shard_rows(store, shards).items()):
            size = {"num_tokens": sum(table["length"].to_pylist()), "num_rows": len(table)}
            values[shard] = fill(column, **size, seed=seed)
            write_column(store, manifest, shard, column, values[shard], **size)
        return values

    return written


@pytest.fixture
def fill_store(
    store: Store,
    small_shards: None,
    make_rows: Callable[..., list[np.ndarray]],
    lay: Callable[..., Selection],
    write_shards: Callable[..., dict[str, Values]],
    every_axis: Column,
) -> Callable[..., Selection]:
    """Fill the store: tokens of three rows in two shards, a column in both or in the first so many, and a constant."""

    def filled(*, num_shards: int = 2) -> Selection:
        selection = lay(store, make_rows([5, 3, 9]))
        manifest = Manifest(store)
        write_shards(store, manifest, list(selection.shard_names[:num_shards]), every_axis)
        head = {"weight": np.arange(6, dtype="float32").reshape(3, 2)}
        write_column(store, manifest, CONSTANTS, OUTPUT_HEAD, head, num_tokens=0, num_rows=0)
        return selection

    return filled


@pytest.fixture
def tree() -> Callable[[str | Path], dict[str, bytes]]:
    """Give every file below a folder: relative path -> bytes."""

    def files(folder: str | Path) -> dict[str, bytes]:
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}

    return files
