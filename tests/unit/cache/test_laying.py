"""Rows are laid, found and named as ever, also where they are too many to be held at once."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_rows import known

from coldstill.cache.identity import ROW_ID_BYTES, shard_id
from coldstill.cache.laying import SHARD_TOKENS, WANTED, lay_rows, places_of_rows
from coldstill.cache.records import IN_MEMORY_BYTES, SLICE_RECORDS, Records
from coldstill.cache.row_lines import ROW_SCHEMA, RowLines
from coldstill.cache.rows import compact_rows, publish_rows, read_rows
from coldstill.cache.selections import make_selection, read_selection, selection_file, write_selection
from coldstill.cache.spans import Span
from coldstill.cache.store import Store

# More than a slice, a part or memory holds.
NUM_ROWS = 2 * SLICE_RECORDS + 1000


def rows_by_chance(seed: int, num_rows: int = NUM_ROWS) -> np.ndarray:
    """Ids and lengths; every tenth row is one of those before it."""
    generator = np.random.default_rng(seed)
    rows = np.empty(num_rows, WANTED)
    rows["row"] = np.frombuffer(generator.bytes(ROW_ID_BYTES * num_rows), f"V{ROW_ID_BYTES}")
    rows["length"] = generator.integers(1, 60, num_rows)
    again = np.flatnonzero(generator.random(num_rows) < 0.1)[1:]
    rows[again] = rows[generator.integers(0, again)]
    return rows


def lay_one_by_one(known_shards: dict[bytes, str], rows: np.ndarray) -> Iterator[tuple[bytes, str, int, int, int]]:
    """Lay rows as they were laid when all of them were held in memory."""
    new = dict(zip([row.tobytes() for row in rows["row"]], rows["length"].tolist(), strict=True))
    groups: list[list[bytes]] = []
    room = 0
    for row, length in new.items():
        if row in known_shards:
            continue
        if not groups or length > room:
            groups.append([])
            room = SHARD_TOKENS
        groups[-1].append(row)
        room -= length
    for group in groups:
        start = 0
        for position, row in enumerate(group):
            yield row, shard_id(group), position, start, new[row]
            start += new[row]


def lines_in(laid: RowLines) -> list[tuple[bytes, str, int, int, int]]:
    table = laid.table()
    return list(zip(*(table[name].to_pylist() for name in ROW_SCHEMA.names), strict=True))


@pytest.fixture(scope="module")
def first() -> np.ndarray:
    return rows_by_chance(0)


@pytest.fixture(scope="module")
def second(first: np.ndarray) -> np.ndarray:
    """Rows of which every other one is among the first."""
    rows = rows_by_chance(1, NUM_ROWS // 2)
    rows[::2] = first[: len(rows)][::-2][: len(rows[::2])]
    return rows


def test_many_rows_are_laid_found_and_named_as_a_few_are(store: Store, first: np.ndarray, second: np.ndarray):
    places: dict[bytes, tuple[bytes, str, int, int, int]] = {}
    parts: list[RowLines] = []
    for rows in (first, second):
        wanted = Records.of(rows, WANTED)
        laid = lay_rows(parts, {name for part in parts for name in part.names}, wanted)
        expected = list(lay_one_by_one({row: line[1] for row, line in places.items()}, rows))
        assert lines_in(laid.rows) == expected
        assert (rows["row"][np.asarray(laid.indices)] == np.asarray(laid.rows.lines)["row"]).all()
        places |= {line[0]: line for line in expected}
        parts.append(laid.rows)
        shards = {name for part in parts for name in part.names}
        found = lines_in(places_of_rows(store, parts, shards, wanted))
        assert found == [places[row.tobytes()] for row in rows["row"]]


def test_the_files_of_many_rows_are_those_of_one_table(store: Store, first: np.ndarray, monkeypatch):
    monkeypatch.setattr("coldstill.cache.rows.GROUP_LINES", 50_000)
    monkeypatch.setattr("coldstill.cache.tables.GROUP_LINES", 50_000)
    laid = lay_rows([], [], Records.of(first, WANTED)).rows
    publish_rows(store, laid)
    table = read_rows(store)
    assert len(table) == len(laid)
    plain = table.set_column(1, "shard", table["shard"].cast(pa.string()))
    assert plain.equals(plain.sort_by([("shard", "ascending"), ("position", "ascending")]))
    (name,) = store.objects.files("rows")
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=50_000)
    assert store.objects.read(f"rows/{name}") == sink.getvalue().to_pybytes()
    publish_rows(store, lay_rows([], [], Records.of(rows_by_chance(5, 100), WANTED)).rows)
    compact_rows(store)
    assert len(store.objects.files("rows")) == 1
    assert sum(map(len, known(store))) == len(laid) + len(set(rows_by_chance(5, 100)["row"].tolist()))


def test_a_selection_of_many_rows_is_named_and_written_as_one_of_few(store: Store, first: np.ndarray, monkeypatch):
    monkeypatch.setattr("coldstill.cache.selections.GROUP_LINES", 50_000)
    monkeypatch.setattr("coldstill.cache.tables.GROUP_LINES", 50_000)
    wanted = Records.of(first, WANTED)
    laid = lay_rows([], [], wanted).rows
    found = places_of_rows(store, [laid], laid.names, wanted)
    assert NUM_ROWS * found.lines.dtype.itemsize > IN_MEMORY_BYTES
    spans = [(Span(0, 1, 0.0),) if index % 3 else () for index in range(NUM_ROWS)]
    written = write_selection(store, found, spans, {"n": 1})
    file = store.objects.read(selection_file(written.name))
    table = pq.read_table(pa.BufferReader(file))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=50_000)
    assert file == sink.getvalue().to_pybytes()
    read = read_selection(store, written.name)
    lines = found.table()
    for index in (0, 1, SLICE_RECORDS - 1, SLICE_RECORDS, NUM_ROWS - 1):
        line = lines.slice(index, 1).to_pylist()[0]
        assert read.shard_names[read.shard_numbers[index]] == line["shard"]
        assert (read.positions[index], read.starts[index], read.lengths[index]) == (
            line["position"],
            line["start"],
            line["length"],
        )
        assert read.spans[index] == spans[index]
    assert read.num_tokens == int(first["length"].sum())
    assert make_selection(RowLines.of_tables([lines]), spans, {"n": 1}).name == written.name
