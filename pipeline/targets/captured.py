"""What targets ask of a teacher's forward pass, and what came of it.

Shapes: N real positions of a batch's rows, K largest tokens, M draws, D width.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coldstill.pipeline.models.forward import Place

Draws = tuple[Tensor, Tensor, Tensor]


class TailRequest(NamedTuple):
    """Draws from the tail.

    Attributes:
        k: The tail begins behind so many likeliest tokens.
        num_draws: Draws a position.
        temperatures: What the draws are fit for.
    """

    k: int
    num_draws: int
    temperatures: tuple[float, ...]


@dataclass(frozen=True)
class CaptureRequest:
    """What to keep of a forward; of several requests, `|` gives their union.

    Attributes:
        blocks: Places where to keep the residual stream, such as behind a decoder block.
        ks: How many of the largest logits to keep, for each number that is asked: where logits tie, the largest
            sixteen need not be among the largest sixty-four.
        temperatures: Where to take the logsumexp over the whole vocabulary.
        labels: Whether to keep the logit of the token that follows.
        final_state: Whether to keep the post-norm last state.
        tails: What to draw from the tail.
    """

    blocks: tuple[Place, ...] = ()
    ks: tuple[int, ...] = ()
    temperatures: tuple[float, ...] = ()
    labels: bool = False
    final_state: bool = False
    tails: tuple[TailRequest, ...] = ()

    @property
    def needs_logits(self) -> bool:
        """Whether the output head has to run at all."""
        return bool(self.ks or self.temperatures or self.labels or self.tails)

    def __or__(self, other: "CaptureRequest") -> "CaptureRequest":
        """Ask for what either asks for."""
        return CaptureRequest(**{name: _union(getattr(self, name), getattr(other, name)) for name in _ASKED})


_ASKED = [asked.name for asked in fields(CaptureRequest)]


def union_of(requests: Iterable[CaptureRequest]) -> CaptureRequest:
    """Ask for what any of several requests asks for."""
    return reduce(CaptureRequest.__or__, requests, CaptureRequest())


@dataclass(frozen=True)
class Captured:
    """What was kept, for the N real positions of the batch's rows, one row behind the other.

    Attributes:
        hidden_ND: The stream at each asked place, in the teacher's dtype.
        final_state_ND: The post-norm last state, in the teacher's dtype.
        top_NK: By number K, the largest logits, float32 and descending, and their token ids, int64.
        label_logit_N: The logit of the token that follows, float32; 0 at a row's last position, which has none.
        logsumexp_N: By temperature T, the logsumexp of logits / T over the vocabulary, float32.
        tail_NM: For each asked tail the draws' logits, ids and log-weights, as `draw_tail` gives them.
    """

    hidden_ND: dict[Place, Tensor] = field(default_factory=dict)
    final_state_ND: Tensor | None = None
    top_NK: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    label_logit_N: Tensor | None = None
    logsumexp_N: dict[float, Tensor] = field(default_factory=dict)
    tail_NM: dict[TailRequest, Draws] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Captured":
        """Return the same on a device."""
        return _mapped([self], lambda values: values[0].to(device))

    @property
    def num_bytes(self) -> int:
        """Bytes of all that was kept."""
        return sum(values.nbytes for kept in fields(self) for values in _leaves(getattr(self, kept.name)))


def joined(batches: Sequence[Captured]) -> Captured:
    """Lay what several batches kept behind one another."""
    return _mapped(batches, lambda values: torch.cat(list(values)))


def _mapped(batches: Sequence[Captured], change: Callable[[Sequence[Tensor]], Tensor]) -> Captured:
    """Make one of several that keep the same, tensor by tensor."""
    return Captured(
        **{kept.name: _tree([getattr(batch, kept.name) for batch in batches], change) for kept in fields(Captured)}
    )


def _tree(values: Sequence[Any], change: Callable[[Sequence[Tensor]], Tensor]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return {key: _tree([value[key] for value in values], change) for key in first}
    if isinstance(first, tuple):
        return tuple(_tree(parts, change) for parts in zip(*values, strict=True))
    return None if first is None else change(values)


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif value is not None:
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)


def _union(one: Any, other: Any) -> Any:
    return one or other if isinstance(one, bool) else tuple(sorted({*one, *other}))
