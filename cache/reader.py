"""Rows by selection and index; refuses an incomplete or corrupt store before the first row is given."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from cache.array_object import ArrayObject, object_name
from cache.errors import IncompleteError
from cache.manifest import CommitRecord, Manifest
from cache.rows import Selection
from cache.store import CONSTANTS, Store, shard_folder

RowArrays = dict[str, dict[str, np.ndarray]]

_CHUNK_CACHE_BYTES = 64 << 20
_OPEN_ARRAYS = 4096


def require_complete(manifest: Manifest, selection: Selection, columns: Sequence[str], *, store: str) -> None:
    """Check that every shard of a selection has every column.

    Raises:
        IncompleteError: One has not; the message counts the shards of each incomplete column.
    """
    shards = selection.shard_names()
    problems = []
    for column in columns:
        complete = sum((shard, column) in manifest for shard in shards)
        if complete < len(shards):
            problems.append(f"{complete} of {len(shards)} shards of {column}")
    if problems:
        raise IncompleteError(f"store {store} is incomplete: {'; '.join(problems)}; run: coldstill precompute")


class Reader:
    """Read rows of a selection: each array of each column, cut to the row.

    Memory is bounded whatever the store's size: 64 MiB of decoded chunks and the indices of recently used arrays.
    A reader is not to be shared between processes or threads: make one in each.

    Args:
        store: The store.
        selection: Which rows, in which order.
        columns: Names of the columns to read.

    Raises:
        IncompleteError: A column is not complete for all rows.
    """

    def __init__(self, store: Store, selection: Selection, columns: Sequence[str]) -> None:
        self.columns = tuple(columns)
        self.selection = selection
        self._store = store
        self._manifest = Manifest(store)
        require_complete(self._manifest, selection, columns, store=store.path)
        self._records: dict[tuple[str, str], CommitRecord] = {}
        self._arrays: OrderedDict[tuple[str, str, str], ArrayObject] = OrderedDict()
        self._chunks: OrderedDict[tuple[str, str, str, int], np.ndarray] = OrderedDict()
        self._chunk_bytes = 0

    def __len__(self) -> int:
        return len(self.selection)

    def row(self, index: int) -> RowArrays:
        """Give one row: column name -> array name -> values.

        Arrays of tokens are cut to the row's tokens, `[T, ...]`; arrays of rows to the row's own entry; arrays of the
        shard come whole. The values are read-only views where that saves a copy.

        Raises:
            IndexError: The selection has no such row.
            CorruptError: Stored bytes are not those that were written.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a selection of {len(self)} rows")
        shard = str(self.selection.shards[index])
        return {column: self._row_of_column(shard, column, index) for column in self.columns}

    def _row_of_column(self, shard: str, column: str, index: int) -> dict[str, np.ndarray]:
        record = self._record(shard, column)
        start = int(self.selection.starts[index])
        position = int(self.selection.positions[index])
        values = {}
        for name, spec in record.column.arrays.items():
            if spec.axis == "token":
                values[name] = self._slice(record, name, start, start + int(self.selection.lengths[index]))
            elif spec.axis == "row":
                values[name] = self._slice(record, name, position, position + 1)[0]
            else:
                values[name] = self._slice(record, name, 0, spec.shape[0])
        return values

    def _record(self, shard: str, column: str) -> CommitRecord:
        key = (shard, column)
        if key not in self._records:
            self._records[key] = self._manifest.record(shard, column)
        return self._records[key]

    def _slice(self, record: CommitRecord, name: str, start: int, stop: int) -> np.ndarray:
        array = self._array(record, name)
        length = array.chunk_length
        first, last = start // length, (stop - 1) // length
        if first == last:
            return self._chunk(record, name, array, first)[start - first * length : stop - first * length]
        chunks = np.concatenate([self._chunk(record, name, array, number) for number in range(first, last + 1)])
        return chunks[start - first * length : stop - first * length]

    def _array(self, record: CommitRecord, name: str) -> ArrayObject:
        key = (record.shard, record.column.name, name)
        if key not in self._arrays:
            self._arrays[key] = open_array(self._store, record, name)
            if len(self._arrays) > _OPEN_ARRAYS:
                self._arrays.popitem(last=False)
        self._arrays.move_to_end(key)
        return self._arrays[key]

    def _chunk(self, record: CommitRecord, name: str, array: ArrayObject, number: int) -> np.ndarray:
        key = (record.shard, record.column.name, name, number)
        if key not in self._chunks:
            self._chunks[key] = array.chunk(number)
            self._chunk_bytes += self._chunks[key].nbytes
            while self._chunk_bytes > _CHUNK_CACHE_BYTES and len(self._chunks) > 1:
                self._chunk_bytes -= self._chunks.popitem(last=False)[1].nbytes
        self._chunks.move_to_end(key)
        return self._chunks[key]


def open_array(store: Store, record: CommitRecord, name: str) -> ArrayObject:
    """Open one array of a committed column.

    Raises:
        CorruptError: Its object is missing or damaged.
    """
    spec = record.column.arrays[name]
    path = f"{shard_folder(record.shard)}/{record.column.name}/{name}/{object_name(spec)}"
    return ArrayObject(
        lambda start, num_bytes: store.objects.read_range(path, start, num_bytes),
        spec=spec,
        shape=spec.full_shape(num_tokens=record.num_tokens, num_rows=record.num_rows),
        label=f"column {record.column.name}, array {name}, shard {record.shard}, in {store.path}",
    )


def read_column(store: Store, record: CommitRecord) -> dict[str, np.ndarray]:
    """Read a committed column whole: array name -> values of the full shape in its shard."""
    values = {}
    for name in record.column.arrays:
        array = open_array(store, record, name)
        num_chunks = -(-array.shape[0] // array.chunk_length)
        values[name] = np.concatenate([array.chunk(number) for number in range(num_chunks)])
    return values


def read_constants(store: Store, column: str) -> tuple[dict[str, np.ndarray], CommitRecord]:
    """Read a column that holds for the whole store, such as the output head.

    Raises:
        IncompleteError: It was never committed.
    """
    manifest = Manifest(store)
    if (CONSTANTS, column) not in manifest:
        raise IncompleteError(f"store {store.path} has no {column}; run: coldstill precompute")
    record = manifest.record(CONSTANTS, column)
    return read_column(store, record), record
