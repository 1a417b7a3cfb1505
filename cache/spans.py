"""How much each token of a row weighs in a loss: spans of weights, such as a prompt of weight 0.

A span is over token indices as things to be predicted: the weight at index t is that of predicting token t, which
position t - 1 does. What no span covers has weight 1. Weights belong to a run's selection, not to the row: the same
stored columns serve every weighting.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


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


@dataclass(frozen=True)
class RowSpans:
    """The spans of many rows behind one another; `spans[index]` gives those of one row.

    Attributes:
        offsets: Where each row's spans begin, and where the last one's end, int64 [rows + 1].
        starts: Of each span, int32 [spans].
        stops: Of each span, int32 [spans].
        weights: Of each span, float32 [spans].
    """

    offsets: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    weights: np.ndarray

    @classmethod
    def of_rows(cls, rows: Iterable[Iterable[Span]]) -> "RowSpans":
        """Lay the spans of some rows; one of weight 1 says nothing, and is left out."""
        kept = [[span for span in spans if span.weight != 1] for spans in rows]
        flat = [span for spans in kept for span in spans]
        return cls.of_counts(
            np.array([len(spans) for spans in kept], np.int32),
            np.array([span.start for span in flat], np.int32),
            np.array([span.stop for span in flat], np.int32),
            # A zero has one sign, so that equal weights have equal bytes.
            np.array([span.weight for span in flat], np.float32) + np.float32(0),
        )

    @classmethod
    def of_prompts(cls, lengths: np.ndarray) -> "RowSpans":
        """Lay a span of weight 0 over the first tokens of each row, so many as `lengths` says, int32 [rows]."""
        stops = lengths[lengths > 0]
        return cls.of_counts(lengths > 0, np.zeros_like(stops), stops, np.zeros(len(stops), np.float32))

    @classmethod
    def of_counts(cls, counts: np.ndarray, starts: np.ndarray, stops: np.ndarray, weights: np.ndarray) -> "RowSpans":
        """Lay spans of which each row has as many as its entry in `counts` says."""
        return cls(np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]), starts, stops, weights)

    @property
    def counts(self) -> np.ndarray:
        """How many spans each row has, int32 [rows]."""
        return np.diff(self.offsets).astype(np.int32)

    def prompt_lengths(self) -> np.ndarray | None:
        """Undo `of_prompts`: int32 [rows], or None where a row says more."""
        if (self.counts > 1).any() or self.starts.any() or self.weights.any():
            return None
        lengths = np.zeros(len(self), np.int32)
        lengths[self.counts > 0] = self.stops
        return lengths

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[Span, ...]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        own = slice(self.offsets[index], self.offsets[index + 1])
        columns = (values[own].tolist() for values in (self.starts, self.stops, self.weights))
        return tuple(Span(*span) for span in zip(*columns, strict=True))
