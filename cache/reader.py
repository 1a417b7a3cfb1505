"""Rows by selection and index; refuses an incomplete or corrupt store before the first row is given."""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from coldstill.cache.arrays import ArraySource, OpenArray, decode_chunks, open_column, read_column, read_index
from coldstill.cache.errors import IncompleteError
from coldstill.cache.manifest import CommitRecord, Manifest
from coldstill.cache.selections import Selection
from coldstill.cache.store import CONSTANTS, Store
from coldstill.cache.tokens import LENGTHS, TOKENS

RowArrays = dict[str, dict[str, np.ndarray]]

CHUNK_CACHE_BYTES = 16 << 20
OPEN_COLUMNS = 1024
# A block stays in memory as long as one of its chunks does.
BLOCK_BYTES = 1 << 20

_Span = tuple[int, int]
_ChunkKey = tuple[str, int]


def require_complete(manifest: Manifest, selection: Selection, columns: Sequence[str], *, store: str) -> None:
    """Check that every shard of a selection has every column.

    Raises:
        IncompleteError: One has not; the message counts the shards of each incomplete column.
    """
    shards = set(selection.shard_names)
    problems = []
    for column in columns:
        complete = len(shards.intersection(manifest.shards(column)))
        if complete < len(shards):
            problems.append(f"{complete} of {len(shards)} shards of {column}")
    if problems:
        raise IncompleteError(f"store {store} is incomplete: {'; '.join(problems)}; run: coldstill precompute")


class Reader:
    """Read rows of a selection: each array of each column, cut to the row.

    Memory is bounded whatever the store's size: 64 MiB of decoded chunks, the indices of recently used arrays, and the
    commit records of the columns that are read. Several threads may read at once: what they fetch they decode beside
    each other. A reader is not to be shared between processes: make one in each.

    Args:
        store: The store.
        selection: Which rows, in which order.
        columns: Names of the columns to read. Of the tokens only the ids are read: the lengths are the selection's.
        local_copy: A folder that keeps copies of the arrays, for a store on object storage; None to read in place.

    Raises:
        IncompleteError: A column is not complete for all rows.
    """

    def __init__(
        self, store: Store, selection: Selection, columns: Sequence[str], *, local_copy: str | None = None
    ) -> None:
        self.columns = tuple(columns)
        self.selection = selection
        self._store = store
        self._local_copy = local_copy
        self._source = ArraySource(store, local_copy=local_copy)
        self.manifest = Manifest(store, columns=self.columns)
        require_complete(self.manifest, selection, columns, store=store.path)
        self._open: OrderedDict[tuple[str, str], list[OpenArray]] = OrderedDict()
        self._chunks: OrderedDict[_ChunkKey, _Chunk] = OrderedDict()
        self._chunk_bytes = 0
        # Held while what is known is looked up and added to, and never while something is read or decoded.
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.selection)

    def row(self, index: int) -> RowArrays:
        """Return one row; see `rows`."""
        return self.rows([index])[0]

    def rows(self, indices: Sequence[int]) -> list[RowArrays]:
        """Return rows, each as column name -> array name -> values; what they need is fetched together.

        Arrays of tokens are cut to the row's tokens, `[T, ...]`; arrays of rows to the row's own entry; arrays of the
        shard come whole. The values are read-only views where that saves a copy.

        Raises:
            IndexError: The selection has no such row.
            CorruptError: Stored bytes are not those that were written.
        """
        places = [self._place(index) for index in indices]
        opened = self._opened(dict.fromkeys(shard for shard, _, _ in places))
        wanted = {
            (array.stored.name, number): array
            for shard, tokens, rows in places
            for column in self.columns
            for array in opened[shard, column]
            for number in _chunk_numbers(array, _span(array, tokens, rows))
        }
        chunks = self._loaded(wanted)
        return [
            {
                column: {array.name: _cut(array, chunks, tokens, rows) for array in opened[shard, column]}
                for column in self.columns
            }
            for shard, tokens, rows in places
        ]

    def _place(self, index: int) -> tuple[str, _Span, _Span]:
        """Return a row's shard and its spans on the axes of tokens and of rows."""
        selection = self.selection
        if not 0 <= index < len(selection):
            raise IndexError(f"row {index} of a selection of {len(selection)} rows")
        start, position = int(selection.starts[index]), int(selection.positions[index])
        shard = selection.shard_names[selection.shard_numbers[index]]
        return shard, (start, start + int(selection.lengths[index])), (position, position + 1)

    def _opened(self, shards: Iterable[str]) -> dict[tuple[str, str], list[OpenArray]]:
        """Return the open arrays of all columns in some shards."""
        keys = [(shard, column) for shard in shards for column in self.columns]
        with self._lock:
            opened = {key: self._open[key] for key in keys if key in self._open}
            for key in opened:
                self._open.move_to_end(key)
        fresh = {key: self._arrays(self.manifest.record(*key)) for key in keys if key not in opened}
        if fresh:
            read_index(self._source, [array for arrays in fresh.values() for array in arrays])
            with self._lock:
                self._open |= fresh
                while len(self._open) > OPEN_COLUMNS:
                    self._open.popitem(last=False)
        return opened | fresh

    def _arrays(self, record: CommitRecord) -> list[OpenArray]:
        arrays = open_column(self._store, record, local_copy=self._local_copy)
        return [array for array in arrays if (record.column.name, array.name) != (TOKENS, LENGTHS)]

    def _loaded(self, wanted: dict[_ChunkKey, OpenArray]) -> dict[_ChunkKey, "_Chunk"]:
        """Return the wanted chunks, from memory or from the store."""
        with self._lock:
            chunks = {key: self._chunks[key] for key in wanted if key in self._chunks}
            for key in chunks:
                self._chunks.move_to_end(key)
        missing = [key for key in wanted if key not in chunks]
        if missing:
            fetched = self._fetched(missing, wanted)
            with self._lock:
                for key, chunk in fetched.items():
                    # Another thread may have fetched the same.
                    self._chunk_bytes += chunk.nbytes - (self._chunks[key].nbytes if key in self._chunks else 0)
                    self._chunks[key] = chunk
                while self._chunk_bytes > CHUNK_CACHE_BYTES and len(self._chunks) > 1:
                    self._chunk_bytes -= self._chunks.popitem(last=False)[1].nbytes
            chunks |= fetched
        return chunks

    def _fetched(self, missing: Sequence[_ChunkKey], wanted: dict[_ChunkKey, OpenArray]) -> dict[_ChunkKey, "_Chunk"]:
        """Read and decode chunks."""
        fetched: dict[_ChunkKey, _Chunk] = {}
        parts = iter(self._source.read([(wanted[key], *wanted[key].object.chunk_range(key[1])) for key in missing]))
        for name, numbers in _runs(missing, wanted):
            array = wanted[name, numbers[0]]
            block = decode_chunks(array, numbers, [next(parts) for _ in numbers])
            block.flags.writeable = False  # rows are views of it
            for index, number in enumerate(numbers):
                chunk = _Chunk(block, index * array.object.chunk_length, block.nbytes // len(numbers))
                fetched[name, number] = chunk
        return fetched


def read_constants(store: Store, column: str) -> tuple[dict[str, np.ndarray], CommitRecord]:
    """Read a column that holds for the whole store, such as the output head.

    Raises:
        IncompleteError: It was never committed.
    """
    manifest = Manifest(store, columns=[column])
    if (CONSTANTS, column) not in manifest:
        raise IncompleteError(f"store {store.path} has no {column}; run: coldstill precompute")
    record = manifest.record(CONSTANTS, column)
    return read_column(store, record), record


def _span(array: OpenArray, tokens: _Span, rows: _Span) -> _Span:
    if array.axis == "shard":
        return 0, array.object.shape[0]
    return tokens if array.axis == "token" else rows


def _chunk_numbers(array: OpenArray, span: _Span) -> range:
    length = array.object.chunk_length
    return range(span[0] // length, (span[1] - 1) // length + 1)


@dataclass(frozen=True)
class _Chunk:
    """A decoded chunk, as a part of the block of neighbours that were decoded with it.

    Attributes:
        block: Their values, one chunk behind the other.
        start: Where this chunk begins in it.
        nbytes: Of this chunk.
    """

    block: np.ndarray
    start: int
    nbytes: int


def _runs(keys: Sequence[_ChunkKey], arrays: dict[_ChunkKey, OpenArray]) -> Iterator[tuple[str, range]]:
    """Yield the runs of consecutive chunks of one array, in the order of the keys; each fits a block."""
    first = 0
    for index in range(1, len(keys) + 1):
        name, number = keys[first]
        longest = max(BLOCK_BYTES // arrays[keys[first]].object.chunk_bytes, 1)
        is_full = index - first >= 1 << (longest.bit_length() - 1)
        if is_full or index == len(keys) or keys[index] != (name, number + index - first):
            yield name, range(number, number + index - first)
            first = index


def _cut(array: OpenArray, chunks: dict[_ChunkKey, _Chunk], tokens: _Span, rows: _Span) -> np.ndarray:
    """Cut one row's values out of its chunks; without a copy where these are neighbours in memory."""
    start, stop = _span(array, tokens, rows)
    numbers = _chunk_numbers(array, (start, stop))
    parts = [chunks[array.stored.name, number] for number in numbers]
    length = array.object.chunk_length
    offset = start - numbers[0] * length
    if all(part.block is parts[0].block and part.start == parts[0].start + i * length for i, part in enumerate(parts)):
        offset += parts[0].start
        values = parts[0].block[offset : offset + stop - start]
    else:
        joined = np.concatenate([part.block[part.start : part.start + length] for part in parts])
        values = joined[offset : offset + stop - start]
    return values[0] if array.axis == "row" else values
