"""The labels of rows themselves, as many for every row; none mostly."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from coldstill.cache.records import SLICE_RECORDS, Records


class RowLabels:
    """Labels of many rows, on disk where they are many; `labels[index]` gives those of one row, float32 [labels].

    Args:
        num_labels: Of each row.
    """

    def __init__(self, num_labels: int = 0) -> None:
        self.num_labels = num_labels
        self._values = Records("<f4")
        self._num_rows = 0

    @classmethod
    def of_rows(cls, rows: Iterable[Sequence[float]], num_rows: int) -> "RowLabels":
        """Lay the labels of some rows; none for rows that have none.

        Raises:
            ValueError: There are not as many for every row, or one is no finite number.
        """
        given = list(rows)
        if not given:
            made = cls()
            made.append(np.zeros((num_rows, 0), np.float32))
            return made
        counts = sorted(set(map(len, given)))
        if len(given) != num_rows or len(counts) > 1:
            raise ValueError(f"{num_rows} rows need as many labels each, got {len(given)} with {counts} labels")
        made = cls(counts[0])
        made.append(np.array(given, np.float32).reshape(num_rows, made.num_labels))
        return made

    def append(self, labels: np.ndarray) -> None:
        """Add the labels of some rows, float32 [rows, labels].

        Raises:
            ValueError: One is no finite number.
        """
        # A zero has one sign, so that equal labels have equal bytes.
        values = np.asarray(labels, np.float32) + np.float32(0)
        if not np.isfinite(values).all():
            raise ValueError("a label of a row is not a finite number")
        self._values.append(values.reshape(-1))
        self._num_rows += len(values)

    def slices(self, size: int = SLICE_RECORDS) -> Iterator[np.ndarray]:
        """Yield the labels of all rows, so many rows at a time, float32 [rows, labels]."""
        for start in range(0, self._num_rows, size):
            yield self.read(start, start + size)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the labels of the rows from `start` to before `stop`, float32 [rows, labels]."""
        stop = min(stop, self._num_rows)
        return self._values.read(start * self.num_labels, stop * self.num_labels).reshape(stop - start, self.num_labels)

    @property
    def shape(self) -> tuple[int, int]:
        """How many rows there are, and how many labels each has."""
        return self._num_rows, self.num_labels

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> np.ndarray:
        row: np.ndarray = self.read(index, index + 1)[0]
        return row

    def tolist(self) -> list[list[float]]:
        """Return all labels as Python has them."""
        labels: list[list[float]] = np.asarray(self).tolist()
        return labels

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.read(0, self._num_rows), dtype)
