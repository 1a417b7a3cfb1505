"""A transformers Trainer whose step waits for nothing: batches come complete and in time, and no number is asked for.

What a GPU is asked for in the middle of a step holds up everything behind it: the host waits until all that it was
given is done, and only then gives it more.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from coldstill.pipeline.stage_two.completing import Completing, complete_batch
from coldstill.pipeline.stage_two.feed import Chosen, Feed, unread


class FedTrainer(Trainer):
    """A Trainer that completes batches where they are made, reads rows by threads, and filters losses on the device.

    Takes what `transformers.Trainer` takes.

    Args:
        reader_threads: So many threads make batches of `RowSet`s beside each other; with 0 a DataLoader makes them, and
            of other data sets in any case.
    """

    data_collator: Callable[[Any], Any]

    def __init__(self, *args: Any, reader_threads: int = 0, **kwargs: Any) -> None:
        self._reader_threads = reader_threads
        self._feed: Feed | None = None
        self._epoch_iterator: Any = None
        self._coming: Iterator[Any] = iter(())
        self._filters_in_step = False
        super().__init__(*args, **kwargs)

    @property
    def filters_losses(self) -> bool:
        """Whether a loss that is not finite is left out of what is logged."""
        return bool(self._filters_in_step or self.args.logging_nan_inf_filter)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; the reading threads end with it."""
        # By its own way the Trainer asks the device whether each loss is finite.
        filters = self.args.logging_nan_inf_filter
        self._filters_in_step, self.args.logging_nan_inf_filter = filters, False
        try:
            return super().train(*args, **kwargs)
        finally:
            self._filters_in_step, self.args.logging_nan_inf_filter = False, filters
            self._close_feed()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | float | None = None
    ) -> Tensor:
        """Return the loss of a batch; the mean since the last log where it is not finite and such are filtered."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not self._filters_in_step:
            return loss
        mean = self._tr_loss / (1 + self.state.global_step - self._globalstep_last_logged)
        return torch.where(loss.isfinite(), loss, mean.to(loss.dtype))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | float | None]:
        """Return the batches of a step, complete, and how many of their positions count."""
        if epoch_iterator is not self._epoch_iterator:
            self._epoch_iterator, self._coming = epoch_iterator, self._in_time(epoch_iterator)
        return super().get_batch_samples(map(complete_batch, self._coming), num_batches, device)

    def _in_time(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield an epoch's batches; those that are only begun, when they are made."""
        for first in batches:
            if isinstance(first, Future):
                assert self._feed is not None
                yield from self._feed.ahead(_chain(first, batches))
                return
            yield first

    def _prepare_inputs(self, inputs: Any) -> Any:
        if isinstance(inputs, Future):
            assert self._feed is not None
            inputs = self._feed.arrived(inputs)
        return super()._prepare_inputs(inputs)

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        own: Callable[[Any], Any] = self.data_collator
        if not self._cuts_batches(dataset):
            self.data_collator = complete = Completing(own)
            named = unread(dataset) if self._reader_threads and not self.args.remove_unused_columns else None
            if named is not None:
                dataset, self.data_collator = named, _Reading(self._open_feed, complete)
        try:
            return super()._get_dataloader(dataset, *args, **kwargs)
        finally:
            self.data_collator = own

    def _cuts_batches(self, dataset: Any) -> bool:
        """Whether each tensor of a batch is cut into as many parts as there are devices: places cannot be."""
        return self.args.n_gpu > 1 or bool(self.accelerator.dispatch_batches) or isinstance(dataset, IterableDataset)

    def _open_feed(self) -> Feed:
        if self._feed is None:
            self._feed = Feed(self._reader_threads, self.args.device)
        return self._feed

    def _close_feed(self) -> None:
        feed, self._feed = self._feed, None
        self._epoch_iterator, self._coming = None, iter(())
        if feed is not None:
            feed.close()


@dataclass(frozen=True)
class _Reading:
    """A collator that begins to make a batch of rows that are named."""

    feed: Callable[[], Feed]
    collate: Completing

    def __call__(self, chosen: Chosen) -> "Future[dict[str, Any]]":
        return self.feed().read(chosen, self.collate)


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest
