"""Lines of rows: which shard holds a row, and where. As many as there are, on disk; a table of them where they are few.

A line is the row's id, its shard's number among the names, its number in the shard, its first token on the shard's
axis, and its tokens.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from coldstill.cache.identity import ROW_ID_BYTES
from coldstill.cache.records import SLICE_RECORDS, Parts, Records

ROW_SCHEMA = pa.schema(
    [
        ("row", pa.binary(ROW_ID_BYTES)),
        ("shard", pa.dictionary(pa.int32(), pa.string())),
        ("position", pa.int32()),
        ("start", pa.int32()),
        ("length", pa.int32()),
    ]
)
ROW_ID = f"V{ROW_ID_BYTES}"
LINE = np.dtype([("row", ROW_ID), ("shard", "<i4"), ("position", "<i4"), ("start", "<i4"), ("length", "<i4")])
_NUMBERS = ("position", "start", "length")


class RowLines:
    """Lines of rows, in some order.

    Attributes:
        names: Of the shards; a line has its shard's number among them.
        lines: The lines, of dtype `LINE`.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.lines = Records(LINE)
        self._numbers: dict[str, int] = {}

    @classmethod
    def of_tables(cls, tables: Iterable[pa.Table]) -> "RowLines":
        """Return the lines of tables, whose columns begin with those of `ROW_SCHEMA`."""
        made = cls()
        for table in tables:
            made.append_table(table)
        return made

    def __len__(self) -> int:
        return len(self.lines)

    def number_of(self, name: str) -> int:
        """Return the number of a shard, which gets the next one where it has none yet."""
        number = self._numbers.setdefault(name, len(self.names))
        if number == len(self.names):
            self.names.append(name)
        return number

    def append_table(self, table: pa.Table) -> None:
        """Add the lines of a table."""
        table = table.combine_chunks()
        shards = table["shard"].cast(pa.string()).combine_chunks().dictionary_encode()
        numbers = np.array([self.number_of(name) for name in shards.dictionary.to_pylist()], np.int32)
        lines = np.empty(len(table), LINE)
        lines["row"] = ids_of(table["row"].combine_chunks())
        lines["shard"] = numbers[shards.indices.to_numpy()] if len(table) else 0
        for name in _NUMBERS:
            lines[name] = table[name].combine_chunks().to_numpy()
        self.lines.append(lines)

    def tables(self, num_lines: int = SLICE_RECORDS) -> Iterator[pa.Table]:
        """Yield the lines as tables of `ROW_SCHEMA`, so many a table, and an empty one where there are none."""
        names = pa.array(self.names, pa.string())
        for start in range(0, max(len(self), 1), num_lines):
            # Nothing of the last table is kept while the next one is made.
            yield _table_of(self.lines.read(start, start + num_lines), names)

    def table(self) -> pa.Table:
        """Return all lines as one table; for lines that are few."""
        (table,) = self.tables(max(len(self), 1))
        return table

    def shards(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each shard's name and its lines, where they lie together."""
        waiting = np.empty(0, LINE)
        for lines in self.lines.slices():
            joined = np.concatenate([waiting, lines])
            starts = [0, *(np.flatnonzero(np.diff(joined["shard"])) + 1).tolist()]
            for start, stop in itertools.pairwise(starts):
                yield self.names[joined["shard"][start]], joined[start:stop]
            waiting = joined[starts[-1] :]
        if len(waiting):
            yield self.names[waiting["shard"][0]], waiting

    def num_tokens(self) -> dict[str, int]:
        """Return the tokens of each shard's lines."""
        sums = np.zeros(len(self.names), np.int64)
        for lines in self.lines.slices():
            np.add.at(sums, lines["shard"], lines["length"])
        return dict(zip(self.names, sums.tolist(), strict=True))


def _table_of(lines: np.ndarray, names: pa.Array) -> pa.Table:
    columns = {name: np.ascontiguousarray(lines[name]) for name in _NUMBERS}
    shards = pa.DictionaryArray.from_arrays(pa.array(np.ascontiguousarray(lines["shard"])), names)
    return pa.table({"row": id_array(lines["row"]), "shard": shards, **columns}, schema=ROW_SCHEMA)


def sorted_lines(parts: Sequence[RowLines]) -> RowLines:
    """Join lines by shard and position, each once: the same lines always make the same."""
    ordered = RowLines()
    for name in sorted({name for part in parts for name in part.names}):
        ordered.number_of(name)
    divided = Parts(LINE, sum(map(len, parts)))
    for part in parts:
        ranks = ranks_of(part, ordered.names)
        for lines in part.lines.slices():
            lines = lines.copy()
            lines["shard"] = ranks[lines["shard"]]
            divided.append(lines["shard"].astype(np.int64) * divided.count // len(ordered.names), lines)
    for lines in divided:
        lines = lines[np.lexsort((lines["position"], lines["shard"]))]
        places = lines[["shard", "position"]]
        is_new = np.ones(len(lines), bool)
        is_new[1:] = places[1:] != places[:-1]
        ordered.lines.append(lines[is_new])
    return ordered


def ranks_of(lines: RowLines, names: Sequence[str]) -> np.ndarray:
    """Map the numbers that lines have for their shards to those of other names, among which all of theirs are."""
    places = {name: place for place, name in enumerate(names)}
    return np.array([places[name] for name in lines.names], np.int32)


def line_of_rows(shard: int, rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the lines of one shard's rows, which lie behind one another in it."""
    lines = np.empty(len(rows), LINE)
    lines["row"], lines["shard"], lines["length"] = rows, shard, lengths
    lines["position"] = np.arange(len(rows))
    lines["start"] = np.cumsum(lengths) - lengths
    return lines


def id_array(rows: np.ndarray) -> pa.Array:
    """Return row ids as Arrow has them."""
    data = pa.py_buffer(np.ascontiguousarray(rows, ROW_ID).tobytes())
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(ROW_ID_BYTES), len(rows), [None, data])


def ids_of(rows: pa.Array) -> np.ndarray:
    """Undo `id_array`."""
    data = np.frombuffer(rows.buffers()[1] or b"", np.uint8) if len(rows) else np.empty(0, np.uint8)
    start = rows.offset * ROW_ID_BYTES
    return data[start : start + len(rows) * ROW_ID_BYTES].view(ROW_ID)
