"""Stored rows to training batches, in an order that is a function of seed and epoch alone.

Knows the reader and tensors; knows no model. Targets leave here as they are stored: the distiller decodes them on the
device that it runs on.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from coldstill.cache.columns import Axis
from coldstill.cache.reader import Reader, RowArrays
from coldstill.cache.selections import Selection, read_selection
from coldstill.cache.spans import Span, token_weights
from coldstill.cache.store import open_store
from coldstill.cache.tokens import TOKENS
from coldstill.pipeline.models.labels import IGNORED
from coldstill.pipeline.stage_two.permutations import Permutation


@dataclass(frozen=True)
class BatchColumns:
    """Which columns a batch carries, by what the distiller calls them.

    Attributes:
        logits: By role, the columns that the logits target reads.
        hidden: By teacher block, the column of its output.
    """

    logits: dict[str, str]
    hidden: dict[int, str]

    def names(self) -> list[str]:
        """Name every column to read."""
        return [TOKENS, *self.logits.values(), *self.hidden.values()]


@dataclass(frozen=True)
class StoredRow:
    """One row as the store gives it, with what the selection says of it.

    Attributes:
        arrays: Of each column.
        spans: What its tokens weigh in a loss.
        labels: Its own labels, float32 [L].
    """

    arrays: RowArrays
    spans: Sequence[Span] = ()
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))


class RowSet(Dataset[StoredRow]):
    """Rows of a recipe as a torch dataset; they are trained on in `EpochOrder`."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> StoredRow:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[StoredRow]:
        """Return the rows of a batch together; a DataLoader asks for them this way."""
        raise NotImplementedError


class SaidRow(Protocol):
    """A row with what is said of it."""

    @property
    def tokens(self) -> np.ndarray:
        """Its token ids [T]."""
        ...

    @property
    def spans(self) -> Sequence[Span]:
        """What its tokens weigh in a loss."""
        ...

    @property
    def labels(self) -> Sequence[float]:
        """Its own labels."""
        ...


class TokenRows(RowSet):
    """Rows as they were made, for a teacher that speaks as training goes: what a selection would say is with them.

    Args:
        rows: Token ids [T], spans and labels of each.
    """

    def __init__(self, rows: Sequence[SaidRow]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, indices: Sequence[int]) -> list[StoredRow]:
        """Return some of the rows."""
        chosen = (self._rows[index] for index in indices)
        return [StoredRow({TOKENS: {"ids": row.tokens}}, row.spans, np.array(row.labels, np.float32)) for row in chosen]


class StoredRows(RowSet):
    """The rows of a selection, with columns of a store.

    The store is opened in the process that reads, at its first row: a handle that crossed a fork could deadlock.

    Args:
        path: The store's folder or URL.
        selection: Which rows, in which order.
        columns: What to read of each row.
        local_copy: A folder that keeps copies of what is read; None to read the store in place.
    """

    def __init__(
        self, path: str, selection: Selection, columns: BatchColumns, *, local_copy: str | None = None
    ) -> None:
        self._path = path
        self._columns = columns
        self._num_rows = len(selection)
        self._name = selection.name
        self._selection: Selection | None = selection
        self._local_copy = local_copy
        self._reader: Reader | None = None
        self._opening = threading.Lock()

    def __len__(self) -> int:
        return self._num_rows

    def __getitems__(self, indices: Sequence[int]) -> list[StoredRow]:
        """Return the rows of a batch, fetched together; several threads may ask at once."""
        reader = self._opened()
        spans, labels = reader.selection.spans, reader.selection.labels
        rows = zip(reader.rows(indices), indices, strict=True)
        return [StoredRow(arrays, spans[index], labels[index]) for arrays, index in rows]

    def _opened(self) -> Reader:
        with self._opening:
            if self._reader is None:
                store, names = open_store(self._path), self._columns.names()
                # A process that was not forked off, but began anew, reads it again.
                selection = self._selection or read_selection(store, self._name)
                self._reader = Reader(store, selection, names, local_copy=self._local_copy)
            return self._reader

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None, "_selection": None, "_opening": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._opening = threading.Lock()


class BatchCollator:
    """Lay stored rows side by side, padded with zeros on the right to the longest.

    Args:
        columns: Which columns the rows carry.
        axes: For each column the axis of each of its arrays.
    """

    def __init__(self, columns: BatchColumns, axes: dict[str, dict[str, Axis]]) -> None:
        self.columns = columns
        self._axes = axes

    def __call__(self, rows: Sequence[StoredRow]) -> dict[str, Any]:
        """Return the distiller's arguments."""
        lengths = np.array([len(row.arrays[TOKENS]["ids"]) for row in rows])
        batch: dict[str, Any] = {
            "input_ids": self._stack(rows, TOKENS, "ids").long(),
            **_labels(rows, int(lengths.max())),
        }
        if (lengths < lengths.max()).any():
            batch["attention_mask"] = torch.from_numpy(np.arange(lengths.max()) < lengths[:, None]).long()
        if self.columns.logits:
            batch["logits"] = {role: self._column(rows, name) for role, name in self.columns.logits.items()}
        if self.columns.hidden:
            batch["hidden"] = {str(block): self._column(rows, name) for block, name in self.columns.hidden.items()}
        return batch

    def _column(self, rows: Sequence[StoredRow], column: str) -> dict[str, Tensor]:
        return {array: self._stack(rows, column, array) for array in self._axes[column]}

    def _stack(self, rows: Sequence[StoredRow], column: str, array: str) -> Tensor:
        values = [row.arrays[column][array] for row in rows]
        if self._axes[column][array] != "token":
            return torch.from_numpy(np.stack(values))
        longest = max(map(len, values))
        stacked = np.zeros((len(values), longest, *values[0].shape[1:]), values[0].dtype)
        for index, value in enumerate(values):
            stacked[index, : len(value)] = value
        return torch.from_numpy(stacked)


# Of so many rows the whole order is held; of more it is computed as it is needed.
SHUFFLED_ROWS = 1 << 20
_ORDERED_AT_ONCE = 1 << 14


class EpochOrder(Sampler[int]):
    """A new order of the rows each epoch, a function of (seed, epoch) alone: a resumed run meets the same rows.

    Args:
        num_rows: How many rows there are.
        seed: Of the order.
    """

    def __init__(self, num_rows: int, *, seed: int) -> None:
        self._num_rows = num_rows
        self._seed = seed
        self._epoch = 0

    def __len__(self) -> int:
        return self._num_rows

    def __iter__(self) -> Iterator[int]:
        if self._num_rows <= SHUFFLED_ROWS:
            whole = np.random.default_rng([self._seed, self._epoch]).permutation(self._num_rows)
            order: Callable[[np.ndarray], np.ndarray] = whole.__getitem__
        else:
            order = Permutation(self._num_rows, seed=(self._seed, self._epoch))
        for start in range(0, self._num_rows, _ORDERED_AT_ONCE):
            yield from order(np.arange(start, min(start + _ORDERED_AT_ONCE, self._num_rows))).tolist()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; the Trainer calls this before each."""
        self._epoch = epoch


def _labels(rows: Sequence[StoredRow], longest: int) -> dict[str, Tensor]:
    """Return `labels`, and `weights` and `row_labels` where rows have them.

    The labels are the ids themselves; `IGNORED` at the first one, which nothing predicts, where a token weighs nothing
    and behind a row.
    """
    labels = np.full((len(rows), longest), IGNORED, dtype=np.int64)
    weights = np.zeros((len(rows), longest), dtype=np.float32)
    for index, row in enumerate(rows):
        ids = row.arrays[TOKENS]["ids"]
        weights[index, 1 : len(ids)] = token_weights(row.spans, len(ids))[1:]
        counted = weights[index] > 0
        labels[index, counted] = ids[counted[: len(ids)]]
    found = {"labels": torch.from_numpy(labels)}
    if ((weights != 0) & (weights != 1)).any():
        found["weights"] = torch.from_numpy(weights)
    if len(rows[0].labels):
        found["row_labels"] = torch.from_numpy(np.stack([row.labels for row in rows]))
    return found
