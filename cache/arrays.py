"""The stored arrays of committed columns: opened by their record, read by ranges, whole or in chunks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coldstill.cache.array_object import REPAIR_HINT, ArrayObject
from coldstill.cache.columns import Axis
from coldstill.cache.local_copy import LocalCopy, StoredObject
from coldstill.cache.manifest import CommitRecord
from coldstill.cache.store import Store
from coldstill.cache.writer import object_path


@dataclass(frozen=True)
class OpenArray:
    """One array of a committed column.

    Attributes:
        name: Within its column.
        axis: What its first dimension counts.
        stored: Where its bytes lie.
        object: Decodes them.
    """

    name: str
    axis: Axis
    stored: StoredObject
    object: ArrayObject


class ArraySource:
    """Reads ranges of open arrays.

    Args:
        store: Where they lie.
        local_copy: A folder that keeps copies of what is read, or None to read in place.
    """

    def __init__(self, store: Store, *, local_copy: str | None = None) -> None:
        self._objects = store.objects
        self._copy = LocalCopy(local_copy, store.objects) if local_copy else None

    def read(self, ranges: Sequence[tuple[OpenArray, int, int]]) -> list[bytes]:
        """Return parts of arrays' objects, each as (array, start, number of bytes).

        Raises:
            CorruptError: An object is missing, or its copy is not what was written.
        """
        asked = [wanted for wanted in ranges if wanted[2]]
        parts = iter(self._read_copies(asked) if self._copy else self._read_in_place(asked))
        return [next(parts) if num_bytes else b"" for _, _, num_bytes in ranges]

    def _read_in_place(self, ranges: Sequence[tuple[OpenArray, int, int]]) -> list[bytes]:
        try:
            return self._objects.read_ranges(
                [(array.stored.name, start, num_bytes) for array, start, num_bytes in ranges]
            )
        except FileNotFoundError as error:
            arrays = {array.stored.name: array for array, _, _ in ranges}
            raise arrays[str(error.filename)].object.corrupt("its object is missing") from None

    def _read_copies(self, ranges: Sequence[tuple[OpenArray, int, int]]) -> list[bytes]:
        assert self._copy is not None
        asked = [(self._name(array), start, num_bytes) for array, start, num_bytes in ranges]
        try:
            return self._copy.objects.read_ranges(asked)
        except FileNotFoundError:
            # The folder of the copies was emptied a moment ago: they are made again.
            asked = [(self._name(array), start, num_bytes) for array, start, num_bytes in ranges]
            return self._copy.objects.read_ranges(asked)

    def _name(self, array: OpenArray) -> str:
        assert self._copy is not None
        try:
            return self._copy.fetch(array.stored)
        except FileNotFoundError:
            raise array.object.corrupt("its object is missing") from None
        except ValueError as error:
            raise array.object.corrupt(str(error)) from None


def open_column(store: Store, record: CommitRecord, *, local_copy: str | None = None) -> list[OpenArray]:
    """Open the arrays of a committed column; nothing is read yet.

    Args:
        store: The store.
        record: The column's commit record.
        local_copy: Where copies of the arrays are read from, as errors say it.
    """
    where = f"{store.path} (its copy in {local_copy})" if local_copy else store.path
    advice = f"remove {local_copy}, and {REPAIR_HINT.removeprefix('run: ')} if that does not help" if local_copy else ""
    arrays = []
    for name, spec in record.column.arrays.items():
        entry = record.objects[name]
        opened = ArrayObject(
            spec=spec,
            shape=spec.full_shape(num_tokens=record.num_tokens, num_rows=record.num_rows),
            num_bytes=entry["bytes"],
            label=f"column {record.column.name}, array {name}, shard {record.shard}, in {where}",
            advice=advice or REPAIR_HINT,
        )
        arrays.append(
            OpenArray(name, spec.axis, StoredObject(object_path(record, name), entry["bytes"], entry["sha256"]), opened)
        )
    return arrays


def read_column(store: Store, record: CommitRecord) -> dict[str, np.ndarray]:
    """Read a committed column whole: array name -> values of the full shape in its shard.

    Raises:
        CorruptError: Stored bytes are not those that were written.
    """
    source = ArraySource(store)
    values = {}
    for array in open_column(store, record):
        read_index(source, [array])
        numbers = range(array.object.num_chunks)
        parts = source.read([(array, *array.object.chunk_range(number)) for number in numbers])
        values[array.name] = decode_chunks(array, numbers, parts)[: array.object.shape[0]]
    return values


def decode_chunks(array: OpenArray, numbers: range, parts: Sequence[bytes]) -> np.ndarray:
    """Decode consecutive chunks into one block, from the bytes of each."""
    block = array.object.empty(len(numbers))
    length = array.object.chunk_length
    for index, (number, part) in enumerate(zip(numbers, parts, strict=True)):
        array.object.decode(number, part, block[index * length : (index + 1) * length])
    return block


def read_index(source: ArraySource, arrays: Sequence[OpenArray]) -> None:
    """Read the chunk indices of arrays that were just opened."""
    indices = source.read([(array, *array.object.index_range) for array in arrays])
    for array, data in zip(arrays, indices, strict=True):
        array.object.take_index(data)
