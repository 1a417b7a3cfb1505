"""Rows in a file, written one after another and read by slices: what they cost in memory does not hang on their number.

The file is Arrow's, in batches of one number of rows, which are short enough that a row is found by reading little.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import pyarrow as pa

from coldstill.cache.identity import ROW_ID_BYTES, row_ids
from coldstill.cache.laying import WANTED
from coldstill.cache.records import SLICE_RECORDS
from coldstill.cache.row_lines import id_array, ids_of
from coldstill.cache.spans import RowSpans, Span, SpanSlice

# Of a batch, where its rows are full.
_BATCH_TOKENS = 1 << 16
# Batches that stay in memory: rows are mostly read one after another.
_OPEN_BATCHES = 4

_SPAN = pa.struct([("start", pa.int32()), ("stop", pa.int32()), ("weight", pa.float32())])
_SCHEMA = pa.schema(
    [
        ("row", pa.binary(ROW_ID_BYTES)),
        ("length", pa.int32()),
        ("tokens", pa.list_(pa.uint32())),
        ("spans", pa.list_(_SPAN)),
        ("labels", pa.list_(pa.float32())),
    ]
)

Item = TypeVar("Item")


@dataclass(frozen=True)
class Row:
    """One row, and what the run says of it.

    Attributes:
        tokens: Its token ids [T], uint32; they alone are its identity in a store.
        spans: What its tokens weigh in a loss, ascending and disjoint; 1 where no span covers them.
        labels: Its own labels, as many for every row of a split.
    """

    tokens: np.ndarray
    spans: tuple[Span, ...] = ()
    labels: tuple[float, ...] = ()


def batch_rows(sequence_length: int) -> int:
    """Return how many rows of at most so many tokens are a batch."""
    return max(_BATCH_TOKENS // sequence_length, 1)


class RowWriter:
    """Writes rows into a new file.

    Args:
        path: The file.
        num_batch_rows: Rows of a batch.
        without: Ids of rows that are left out.

    Attributes:
        num_rows: Rows that were written.
        num_tokens: Their tokens.
        num_left_out: Rows that were left out.
        largest_id: The largest token id of them; -1 where there are none.
    """

    def __init__(self, path: Path, num_batch_rows: int, *, without: Collection[bytes] = frozenset()) -> None:
        self.num_rows = self.num_tokens = self.num_left_out = 0
        self.largest_id = -1
        self._num_batch_rows = num_batch_rows
        self._without = without
        self._waiting: list[_Part] = []
        self._num_waiting = 0
        self._file = pa.OSFile(str(path), "wb")
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        self._writer = pa.ipc.new_file(self._file, _SCHEMA, options=options)

    def append(self, row: Row) -> None:
        """Add a row."""
        self._take(_Part.of(row.tokens, np.array([len(row.tokens)], np.int32), [row]))

    def append_equal(self, tokens_NT: np.ndarray) -> None:
        """Add rows of one length of which nothing is said, uint32 [rows, T]."""
        num_rows, length = tokens_NT.shape
        self._take(_Part.of(tokens_NT.reshape(-1), np.full(num_rows, length, np.int32), None))

    def close(self) -> None:
        """Write what waits, and end the file."""
        self._flush()
        self._writer.close()
        self._file.close()

    def _take(self, part: "_Part") -> None:
        kept = part.without(self._without)
        self.num_left_out += len(part.lengths) - len(kept.lengths)
        while len(kept.lengths):
            now, kept = kept.split(self._num_batch_rows - self._num_waiting)
            self._waiting.append(now)
            self._num_waiting += len(now.lengths)
            if self._num_waiting == self._num_batch_rows:
                self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        tokens, lengths, rows = (
            np.concatenate([getattr(part, name) for part in self._waiting]) for name in ("tokens", "lengths", "rows")
        )
        columns = [
            id_array(rows),
            pa.array(lengths),
            pa.ListArray.from_arrays(_offsets(lengths), pa.array(tokens)),
            _span_lists([row.spans for part in self._waiting for row in part.said or ()], len(lengths)),
            _label_lists([row.labels for part in self._waiting for row in part.said or ()], len(lengths)),
        ]
        self._writer.write_table(pa.table(columns, names=_SCHEMA.names).cast(_SCHEMA))
        self.num_rows += len(lengths)
        self.num_tokens += len(tokens)
        self.largest_id = max(self.largest_id, int(tokens.max()))
        self._waiting, self._num_waiting = [], 0


@dataclass(frozen=True)
class _Part:
    """Rows that wait until they are a batch: token ids, lengths and row ids, and what is said of them, or nothing."""

    tokens: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    said: list[Row] | None

    @classmethod
    def of(cls, tokens: np.ndarray, lengths: np.ndarray, said: list[Row] | None) -> "_Part":
        return cls(tokens, lengths, row_ids(tokens, lengths.tolist()), said)

    def without(self, rows: Collection[bytes]) -> "_Part":
        """Return the rows whose ids are not among some."""
        if not rows:
            return self
        is_kept = np.array([row not in rows for row in id_array(self.rows).to_pylist()], bool)
        if is_kept.all():
            return self
        said = None if self.said is None else list(itertools.compress(self.said, is_kept))
        return _Part(self.tokens[np.repeat(is_kept, self.lengths)], self.lengths[is_kept], self.rows[is_kept], said)

    def split(self, num_rows: int) -> "tuple[_Part, _Part]":
        """Return so many rows, and the others."""
        if num_rows >= len(self.lengths):
            nothing = np.empty(0, np.int32)
            return self, _Part(nothing.astype(np.uint32), nothing, self.rows[:0], None)
        num_tokens = int(self.lengths[:num_rows].sum())
        first, second = (None, None) if self.said is None else (self.said[:num_rows], self.said[num_rows:])
        return (
            _Part(self.tokens[:num_tokens], self.lengths[:num_rows], self.rows[:num_rows], first),
            _Part(self.tokens[num_tokens:], self.lengths[num_rows:], self.rows[num_rows:], second),
        )


class RowFile:
    """A file of rows.

    Args:
        path: The file.
        num_rows: How many there are.
        num_batch_rows: Rows of a batch.
        folder: What the file lies in, where that goes when nobody has it any more.
    """

    def __init__(self, path: Path, *, num_rows: int, num_batch_rows: int, folder: object = None) -> None:
        self.path = path
        self._folder = folder
        self._num_rows = num_rows
        self._num_batch_rows = num_batch_rows
        self._open: pa.ipc.RecordBatchFileReader | None = None
        self._batches: OrderedDict[int, _Batch] = OrderedDict()

    def __len__(self) -> int:
        return self._num_rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None, "_batches": OrderedDict()}

    def places(self) -> Iterator[np.ndarray]:
        """Yield the ids and lengths of all rows, as `coldstill.cache.laying` takes them."""
        waiting: list[np.ndarray] = []
        for batch in self._read("row", "length"):
            wanted = np.empty(len(batch), WANTED)
            wanted["row"], wanted["length"] = ids_of(batch["row"]), batch["length"].to_numpy()
            waiting.append(wanted)
            if len(waiting) * self._num_batch_rows >= SLICE_RECORDS:
                yield np.concatenate(waiting)
                waiting = []
        if waiting:
            yield np.concatenate(waiting)

    def spans(self) -> Iterator[SpanSlice]:
        """Yield the spans of all rows."""
        for batch in self._read("spans"):
            of_rows = batch["spans"].flatten()
            yield SpanSlice(
                batch["spans"].value_lengths().to_numpy(), *(of_rows.field(index).to_numpy() for index in range(3))
            )

    def labels(self) -> Iterator[np.ndarray]:
        """Yield the labels of all rows, float32 [rows, labels]."""
        for batch in self._read("labels"):
            yield batch["labels"].flatten().to_numpy().reshape(len(batch), -1 if len(batch["labels"].flatten()) else 0)

    def tokens(self, index: int) -> np.ndarray:
        """Return the token ids of one row, uint32 [T]."""
        batch, place = self._find(index)
        # Not a part of the batch, which would stay in memory with it.
        return batch.tokens[batch.offsets[place] : batch.offsets[place + 1]].copy()

    def pieces(self, indices: np.ndarray) -> list[np.ndarray]:
        """Return the token ids of some rows, behind one another; those of neighbours are one piece."""
        is_first = np.ones(len(indices), bool)
        is_first[1:] = (np.diff(indices) != 1) | (indices[1:] % self._num_batch_rows == 0)
        firsts = np.flatnonzero(is_first)
        pieces = []
        for first, num_rows in zip(firsts.tolist(), np.diff(firsts, append=len(indices)).tolist(), strict=True):
            batch, place = self._find(int(indices[first]))
            pieces.append(batch.tokens[batch.offsets[place] : batch.offsets[place + num_rows]])
        return pieces

    def row(self, index: int) -> Row:
        """Return one row."""
        batch, place = self._find(index)
        spans, labels = batch.said["spans"][place].as_py(), batch.said["labels"][place].as_py()
        return Row(self.tokens(index), tuple(Span(**span) for span in spans), tuple(labels))

    def _find(self, index: int) -> tuple["_Batch", int]:
        number, place = divmod(index, self._num_batch_rows)
        if number not in self._batches:
            # A process that was forked off may read by the same handle: Arrow says each time where it reads.
            self._open = self._open or pa.ipc.open_file(pa.OSFile(str(self.path)))
            self._batches[number] = _Batch.of(self._open.get_batch(number))
            if len(self._batches) > _OPEN_BATCHES:
                self._batches.popitem(last=False)
        self._batches.move_to_end(number)
        return self._batches[number], place

    def _read(self, *names: str) -> Iterator[pa.RecordBatch]:
        """Yield all batches, some columns of them."""
        options = pa.ipc.IpcReadOptions(included_fields=[_SCHEMA.get_field_index(name) for name in names])
        with pa.OSFile(str(self.path)) as file, pa.ipc.open_file(file, options=options) as reader:
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)


@dataclass(frozen=True)
class _Batch:
    """A batch of a file: all tokens, where each row's begin and the last one's end, and what is said of the rows."""

    tokens: np.ndarray
    offsets: list[int]
    said: pa.RecordBatch

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> "_Batch":
        tokens = batch["tokens"]
        return cls(tokens.values.to_numpy(), tokens.offsets.to_pylist(), batch)


class RowView(Sequence[Item]):
    """Something of each row of a file, which is read when it is asked for.

    Args:
        num_rows: How many rows there are.
        read: Gives it of one row.
    """

    def __init__(self, num_rows: int, read: Callable[[int], Item]) -> None:
        self._num_rows = num_rows
        self._read = read

    def __len__(self) -> int:
        return self._num_rows

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self._read(place) for place in range(*index.indices(self._num_rows))]
        place = index + self._num_rows if index < 0 else index
        if not 0 <= place < self._num_rows:
            raise IndexError(f"row {index} of {self._num_rows}")
        return self._read(place)


def _offsets(counts: np.ndarray) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))


def _span_lists(spans: Sequence[Sequence[Span]], num_rows: int) -> pa.Array:
    """Lay the spans of rows; none at all where nothing is said of them."""
    (part,) = RowSpans.of_rows(spans or [()] * num_rows).slices(num_rows)
    fields = [pa.array(values) for values in (part.starts, part.stops, part.weights)]
    return pa.ListArray.from_arrays(_offsets(part.counts), pa.StructArray.from_arrays(fields, fields=list(_SPAN)))


def _label_lists(labels: Sequence[Sequence[float]], num_rows: int) -> pa.Array:
    return pa.array(labels or [()] * num_rows, _SCHEMA.field("labels").type)
