"""Numbers by the million that need not lie in memory: records of one width, appended once and read by slices.

A few stay in memory; more go to a file that has no name, so that nothing of it stays whatever becomes of the process.
"""

import os
import tempfile
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

# So many bytes stay in memory; of each of several parts, fewer.
IN_MEMORY_BYTES = 1 << 20
_PART_BYTES = 1 << 16
# How many are read at once by who goes through all of them.
SLICE_RECORDS = 1 << 16
# Into how many parts records are divided at most, each of which has to fit into memory.
MOST_PARTS = 128


class Records:
    """A growing array of one dimension, which is read by slices; a process that is forked off may read it too.

    Args:
        dtype: Of one record.
        in_memory_bytes: How many bytes stay in memory at most.
    """

    def __init__(self, dtype: npt.DTypeLike, *, in_memory_bytes: int = IN_MEMORY_BYTES) -> None:
        self.dtype = np.dtype(dtype)
        self._in_memory_bytes = in_memory_bytes
        self._count = 0
        self._parts: list[np.ndarray] = []
        # Of the file without a name; -1 while there is none.
        self._file = -1

    @classmethod
    def of(cls, values: npt.ArrayLike, dtype: npt.DTypeLike) -> "Records":
        """Return records of these values."""
        made = cls(dtype)
        made.append(np.asarray(values, dtype))
        return made

    def append(self, values: np.ndarray) -> None:
        """Add records behind the others."""
        values = np.ascontiguousarray(values, self.dtype)
        if self._file < 0 and (self._count + len(values)) * self.dtype.itemsize > self._in_memory_bytes:
            self._file = _open_nameless()
            weakref.finalize(self, os.close, self._file)
            for part in self._parts:
                _write(self._file, part)
            self._parts = []
        if self._file >= 0:
            _write(self._file, values)
        elif len(values):
            self._parts.append(values.copy())
        self._count += len(values)

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the records from `start` to before `stop`; fewer where there are no more."""
        start, stop = min(max(start, 0), self._count), min(max(stop, 0), self._count)
        if self._file < 0:
            return self._whole()[start:stop]
        size = self.dtype.itemsize
        data, wanted = bytearray(), max(stop - start, 0) * size
        while len(data) < wanted:
            # By `pread`: processes that were forked off share the place in the file that `read` goes on from.
            data += os.pread(self._file, wanted - len(data), start * size + len(data))
        return np.frombuffer(data, self.dtype)

    def slices(self, size: int = SLICE_RECORDS) -> Iterator[np.ndarray]:
        """Yield all records, so many at a time."""
        for start in range(0, self._count, size):
            yield self.read(start, start + size)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(f"record {index} of {self._count}")
        return self.read(index, index + 1)[0]

    def __iter__(self) -> Iterator[Any]:
        for part in self.slices():
            yield from part

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.read(0, self._count), dtype)

    def tolist(self) -> list[Any]:
        """Return all records as Python has them."""
        values: list[Any] = np.asarray(self).tolist()
        return values

    def _whole(self) -> np.ndarray:
        if len(self._parts) != 1:
            self._parts = [np.concatenate([np.empty(0, self.dtype), *self._parts])]
        return self._parts[0]


class Parts:
    """Records divided by a key, so that those of one key lie in one part, which fits into memory.

    Args:
        dtype: Of one record.
        num_records: About how many there will be.
    """

    def __init__(self, dtype: npt.DTypeLike, num_records: int) -> None:
        self.count = min(max(1, -(-num_records // SLICE_RECORDS)), MOST_PARTS)
        self._parts = [self._empty(np.dtype(dtype)) for _ in range(self.count)]

    def append(self, parts: np.ndarray, records: np.ndarray) -> None:
        """Add records, each to the part that it is said to belong to; in a part they keep their order."""
        if self.count == 1:
            self._parts[0].append(records)
            return
        order = np.argsort(parts, kind="stable")
        ends = np.cumsum(np.bincount(parts, minlength=self.count))
        for part, own in zip(self._parts, np.split(records[order], ends[:-1]), strict=True):
            part.append(own)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the records of each part, which is empty from then on."""
        for number in range(self.count):
            part, self._parts[number] = self._parts[number], self._empty(self._parts[number].dtype)
            yield part.read(0, len(part))

    def _empty(self, dtype: np.dtype[Any]) -> Records:
        return Records(dtype, in_memory_bytes=IN_MEMORY_BYTES if self.count == 1 else _PART_BYTES)


def scratch_folder() -> str | None:
    """Return where files without a name lie: on a disk, where the usual place may be memory."""
    named = os.environ.get("TMPDIR")
    return "/var/tmp" if not named and os.access("/var/tmp", os.W_OK) else None  # noqa: S108 - such files have no name


def _open_nameless() -> int:
    with tempfile.TemporaryFile(dir=scratch_folder()) as file:
        return os.dup(file.fileno())


def _write(file: int, values: np.ndarray) -> None:
    data = memoryview(values.tobytes())
    while data:
        data = data[os.write(file, data) :]
