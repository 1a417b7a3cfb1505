"""How much each token of a row weighs in a loss: spans of weights, such as a prompt of weight 0.

A span is over token indices as things to be predicted: the weight at index t is that of predicting token t, which
position t - 1 does. What no span covers has weight 1. Weights belong to a run's selection, not to the row: the same
stored columns serve every weighting.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, overload

import numpy as np

from coldstill.cache.records import SLICE_RECORDS, Records


class Span(NamedTuple):
    """The tokens from `start` to before `stop`, and what each of them weighs: 0 is read, but not learned."""

    start: int
    stop: int
    weight: float


def token_weights(spans: Iterable[Span], length: int) -> np.ndarray:
    """Spread a row's spans over its tokens: the weight of each, float32 [T]."""
    weights = np.ones(length, np.float32)
    for span in spans:
        weights[span.start : span.stop] = span.weight
    return weights


def check_spans(spans: Sequence[Span], length: int) -> None:
    """Refuse spans that contradict each other or their row.

    Raises:
        ValueError: A span is empty, is not within the row, begins before the last one ended, or has no finite weight
            of at least 0.
    """
    reached = 0
    for span in spans:
        if not reached <= span.start < span.stop <= length:
            raise ValueError(f"{span} of a row of {length} tokens: spans ascend, do not overlap and lie within the row")
        if not (math.isfinite(span.weight) and span.weight >= 0):
            raise ValueError(f"{span} has no weight: expected a finite number of at least 0")
        reached = span.stop


class RowSpans(Sequence[tuple[Span, ...]]):
    """The spans of many rows behind one another, on disk where they are many; `spans[index]` gives those of one row.

    Attributes:
        starts: Of each span, int32 [spans].
        stops: Of each span, int32 [spans].
        weights: Of each span, float32 [spans].
        are_prompts: Whether no row has more than one span of weight 0, from its first token.
    """

    def __init__(self) -> None:
        self.starts, self.stops, self.weights = Records("<i4"), Records("<i4"), Records("<f4")
        self.are_prompts = True
        # Where each row's spans end.
        self._ends = Records("<i8")
        self._num_spans = 0

    @classmethod
    def of_rows(cls, rows: Iterable[Iterable[Span]]) -> "RowSpans":
        """Lay the spans of some rows; one of weight 1 says nothing, and is left out."""
        made = cls()
        kept = [[span for span in spans if span.weight != 1] for spans in rows]
        flat = [span for spans in kept for span in spans]
        made.append(
            np.array([len(spans) for spans in kept], np.int32),
            np.array([span.start for span in flat], np.int32),
            np.array([span.stop for span in flat], np.int32),
            np.array([span.weight for span in flat], np.float32),
        )
        return made

    def append(self, counts: np.ndarray, starts: np.ndarray, stops: np.ndarray, weights: np.ndarray) -> None:
        """Add spans of rows, of which each has as many as its entry in `counts` says."""
        self._ends.append(self._num_spans + np.cumsum(counts, dtype=np.int64))
        self._num_spans += len(starts)
        self.starts.append(starts)
        self.stops.append(stops)
        # A zero has one sign, so that equal weights have equal bytes.
        self.weights.append(weights.astype(np.float32) + np.float32(0))
        self.are_prompts &= not ((counts > 1).any() or starts.any() or weights.any())

    def append_prompts(self, lengths: np.ndarray) -> None:
        """Add a span of weight 0 over the first tokens of each row, so many as `lengths` says, int32 [rows]."""
        stops = lengths[lengths > 0]
        self.append(lengths > 0, np.zeros_like(stops), stops, np.zeros(len(stops), np.float32))

    def slices(self, size: int = SLICE_RECORDS) -> Iterator["SpanSlice"]:
        """Yield the spans of all rows, so many rows at a time."""
        for start in range(0, len(self), size):
            yield self.part(start, start + size)

    def part(self, start: int, stop: int) -> "SpanSlice":
        """Return the spans of the rows from `start` to before `stop`; fewer where there are no more."""
        first = int(self._ends[start - 1]) if start else 0
        ends = self._ends.read(start, stop)
        last = int(ends[-1]) if len(ends) else first
        values = (values.read(first, last) for values in (self.starts, self.stops, self.weights))
        return SpanSlice(np.diff(ends, prepend=first).astype(np.int32), *values)

    def prompt_lengths(self, start: int, stop: int) -> np.ndarray:
        """Return the length of each row's prompt, int32 [rows], where spans are nothing but prompts."""
        lengths = np.empty(min(stop, len(self)) - start, np.int32)
        for place in range(0, len(lengths), SLICE_RECORDS):
            part = self.part(start + place, min(start + place + SLICE_RECORDS, stop))
            lengths[place : place + SLICE_RECORDS] = part.prompt_lengths()
        return lengths

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> tuple[Span, ...]: ...

    @overload
    def __getitem__(self, index: slice) -> list[tuple[Span, ...]]: ...

    def __getitem__(self, index: int | slice) -> tuple[Span, ...] | list[tuple[Span, ...]]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        _, *of_row = self.part(index, index + 1)
        columns = (values.tolist() for values in of_row)
        return tuple(Span(*span) for span in zip(*columns, strict=True))


class SpanSlice(NamedTuple):
    """The spans of some rows: how many each row has, int32 [rows], and their starts, stops and weights [spans]."""

    counts: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    weights: np.ndarray

    def prompt_lengths(self) -> np.ndarray:
        """Return the length of each row's prompt, int32 [rows], where spans are nothing but prompts."""
        lengths = np.zeros(len(self.counts), np.int32)
        lengths[self.counts > 0] = self.stops
        return lengths

    def check(self, lengths: np.ndarray) -> None:
        """Refuse what `check_spans` refuses, of rows of so many tokens each."""
        if not len(self.starts):
            return
        own = np.repeat(np.arange(len(self.counts)), self.counts)
        reached = np.where(np.diff(own, prepend=-1) > 0, 0, np.concatenate([[0], self.stops[:-1]]))
        is_wrong = ~((reached <= self.starts) & (self.starts < self.stops) & (self.stops <= lengths[own]))
        is_wrong |= ~(np.isfinite(self.weights) & (self.weights >= 0))
        if is_wrong.any():
            row = own[is_wrong.argmax()]
            of_row = own == row
            columns = (values[of_row].tolist() for values in (self.starts, self.stops, self.weights))
            check_spans([Span(*span) for span in zip(*columns, strict=True)], int(lengths[row]))
