"""Batches that threads make beside each other, ahead of their turn, and that are on a GPU before their step.

A DataLoader says which rows come next, and a feed reads them: decompressing, checking and copying rows let go of the
interpreter's lock. For a GPU a batch lies in pinned memory, from which it is copied on a stream of its own while the
step before is computed; its targets are decoded there. Knows rows and batches; knows no model and no trainer.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from coldstill.pipeline.stage_two.batches import RowSet, StoredRow

Batch = dict[str, Any]


@dataclass(frozen=True)
class Chosen:
    """Rows that are to be read.

    Attributes:
        rows: What they are rows of.
        indices: Which they are.
    """

    rows: RowSet
    indices: Sequence[int]


class Unread(Dataset[StoredRow]):
    """Rows that are not read when they are asked for, but named.

    Args:
        rows: The rows.
    """

    def __init__(self, rows: RowSet) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """Name the rows of a batch; a DataLoader asks for them this way."""
        return Chosen(self._rows, indices)


def unread(dataset: Any) -> Any:
    """Return a data set whose rows are named and not read; None where it is none of whole rows."""
    if isinstance(dataset, RowSet):
        return Unread(dataset)
    if isinstance(dataset, Subset) and isinstance(dataset.dataset, RowSet):
        return Subset(Unread(dataset.dataset), dataset.indices)
    return None


class Feed:
    """Threads that read rows and lay them side by side, in the order in which they are asked for.

    Args:
        num_threads: So many batches are made at once.
        device: Where batches are to be; on a GPU they are brought there one step ahead, elsewhere they stay.
    """

    def __init__(self, num_threads: int, device: torch.device) -> None:
        self._num_threads = num_threads
        self._device = device
        self._readers = ThreadPoolExecutor(num_threads, "coldstill-reader")
        # Copies wait for their batch, and are made in order.
        self._carrier = ThreadPoolExecutor(1, "coldstill-carrier")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def read(self, chosen: Chosen, collate: Callable[[Sequence[StoredRow]], Batch]) -> "Future[Batch]":
        """Begin to make a batch."""
        return self._readers.submit(self._make, chosen, collate)

    def ahead(self, coming: Iterator["Future[Batch]"]) -> Iterator[Batch]:
        """Yield batches, while as many as there are threads are made behind the one that is on its way to the device.

        Args:
            coming: Begins to make a batch whenever it is asked for one.
        """
        waiting: deque[Future[Batch]] = deque()
        brought: Future[_Arrived] | None = None
        for begun in coming:
            waiting.append(begun)
            if len(waiting) > self._num_threads:
                arriving, brought = brought, self._bring(waiting.popleft())
                if arriving is not None:
                    yield arriving.result().batch()
        while brought is not None or waiting:
            arriving, brought = brought, self._bring(waiting.popleft()) if waiting else None
            if arriving is not None:
                yield arriving.result().batch()

    def arrived(self, begun: "Future[Batch]") -> Batch:
        """Return a batch, when it is made and on its way."""
        return self._bring(begun).result().batch()

    def close(self) -> None:
        """Let the threads end; what nobody waits for is not begun any more."""
        for pool in (self._readers, self._carrier):
            pool.shutdown(wait=True, cancel_futures=True)

    def _make(self, chosen: Chosen, collate: Callable[[Sequence[StoredRow]], Batch]) -> Batch:
        batch = collate(chosen.rows.__getitems__(chosen.indices))
        return batch if self._stream is None else _of_tensors(batch, Tensor.pin_memory)

    def _bring(self, begun: "Future[Batch]") -> "Future[_Arrived]":
        return self._carrier.submit(self._carry, begun)

    def _carry(self, begun: "Future[Batch]") -> "_Arrived":
        batch = begun.result()
        if self._stream is None:
            return _Arrived(batch)
        with torch.cuda.stream(self._stream):
            moved = _of_tensors(batch, lambda values: values.to(self._device, non_blocking=True))
        return _Arrived(moved, self._stream.record_event())


@dataclass(frozen=True)
class _Arrived:
    """A batch that is on a device, or will be when an event has happened."""

    on_device: Batch
    event: torch.cuda.Event | None = None

    def batch(self) -> Batch:
        """Return the batch for the stream of whoever asks: the stream waits, and nobody else."""
        if self.event is None:
            return self.on_device
        stream = torch.cuda.current_stream(self.on_device["input_ids"].device)
        stream.wait_event(self.event)

        def used_by(values: Tensor) -> Tensor:
            # Its memory came from another stream's, and is free when this one has done with it.
            values.record_stream(stream)
            return values

        return _of_tensors(self.on_device, used_by)


def _of_tensors(batch: Mapping[str, Any], do: Callable[[Tensor], Tensor]) -> Batch:
    """Return a batch with something done to each of its tensors, however deep."""
    done: Batch = {}
    for name, value in batch.items():
        if isinstance(value, Mapping):
            done[name] = _of_tensors(value, do)
        else:
            done[name] = do(value) if isinstance(value, Tensor) else value
    return done
