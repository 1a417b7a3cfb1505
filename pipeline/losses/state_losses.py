"""Losses of a student's states against a teacher's, at each position. Pure tensor functions; all in float32.

Residual streams differ by four orders of magnitude between models and blocks. Within one, a few channels may hold nine
tenths of the squares, and a few positions, attention sinks, have norms a hundred times the others'.
Shapes: N positions that count, D width.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from coldstill.pipeline.recipe.loss import HiddenLoss

_SMALLEST_VARIANCE = 1e-12
_SMALLEST_NORM = 1e-8
# A position whose norm is this many times the median's is a sink, and sets no scale.
_SINK_RATIO = 4.0
# Of the median over channels: a channel that hardly moves does not rule the others.
_SMALLEST_SHARE_OF_MEDIAN = 0.01
# Of a position's mean square, and where all is 0.
_SMALLEST_SHARE_OF_SQUARE = 1e-9


@dataclass(frozen=True)
class StateScale:
    """What a block of the teacher does from one ordinary position to the next: what errors there are measured by.

    Attributes:
        mean_D: Of each channel over ordinary positions, float32.
        variance_D: The same of its variance, above 0.
    """

    mean_D: Tensor
    variance_D: Tensor

    @classmethod
    def of(cls, teacher_ND: Tensor) -> "StateScale":
        """Measure it over some positions, at least one."""
        square_N = teacher_ND.square().mean(dim=-1)
        typical = square_N.median()
        ordinary_ND = teacher_ND[square_N <= _SINK_RATIO**2 * typical]
        variance_D = ordinary_ND.var(dim=0, correction=0)
        smallest = torch.maximum(_SMALLEST_SHARE_OF_MEDIAN * variance_D.median(), _SMALLEST_SHARE_OF_SQUARE * typical)
        return cls(ordinary_ND.mean(dim=0), variance_D.clamp(min=smallest.clamp(min=_SMALLEST_VARIANCE)))

    def error(self, states_ND: Tensor, teacher_ND: Tensor) -> Tensor:
        """Return the mean over channels of squared errors as shares of the channels' variances, [N]."""
        return ((states_ND - teacher_ND).square() / self.variance_D).mean(dim=-1)

    def position_weights(self, teacher_ND: Tensor) -> Tensor:
        """Say what each position weighs, [N]: 1, and less where it lies far out, so that its error is relative."""
        distance_N = self.error(self.mean_D, teacher_ND)
        return _SINK_RATIO**2 / distance_N.clamp(min=_SINK_RATIO**2)


@dataclass(frozen=True)
class BlockScales:
    """The scales of a layer map, by student block.

    Attributes:
        states: Of the teacher's output.
        changes: Of its change since the pair before; there is none for the first pair.
    """

    states: Mapping[int, StateScale] = field(default_factory=dict)
    changes: Mapping[int, StateScale] = field(default_factory=dict)

    @classmethod
    def of(cls, teacher: Iterable[tuple[int, Tensor]]) -> "BlockScales":
        """Measure them, given by mapped student block, in its order, the teacher's states [N, D] at some positions."""
        states: dict[int, StateScale] = {}
        changes: dict[int, StateScale] = {}
        before_ND: Tensor | None = None
        for block, teacher_ND in teacher:
            states[block] = StateScale.of(teacher_ND)
            if before_ND is not None:
                changes[block] = StateScale.of(teacher_ND - before_ND)
            before_ND = teacher_ND
        return cls(states, changes)


def hidden_mse(student_ND: Tensor, teacher_ND: Tensor, _scale: StateScale | None = None) -> Tensor:
    """Mean squared error over channels, [N]: ruled by the positions and channels of largest scale."""
    return (student_ND.float() - teacher_ND).square().mean(dim=-1)


def hidden_normalised_mse(student_ND: Tensor, teacher_ND: Tensor, _scale: StateScale | None = None) -> Tensor:
    """Squared error of each position as a share of the teacher's variance over channels there, [N].

    1 is what a student that gives the teacher's mean over channels would get; a position of huge norm, such as the
    first of a row, counts as any other. Channels of huge scale still rule it: on gemma-3-270m eight of 640 hold up to
    0.9 of the error.
    """
    variance_N = teacher_ND.var(dim=-1, correction=0).clamp(min=_SMALLEST_VARIANCE)
    return (student_ND.float() - teacher_ND).square().mean(dim=-1) / variance_N


def hidden_standardised_mse(student_ND: Tensor, teacher_ND: Tensor, scale: StateScale | None = None) -> Tensor:
    """Mean over channels of the squared error as a share of the channel's variance over ordinary positions, [N].

    1 is what a student gets at ordinary positions, on every model and block, that knows of the teacher its mean alone;
    at an attention sink it gets 16, of whatever norm that is.

    Args:
        student_ND: The student's, of any floating dtype.
        teacher_ND: The teacher's, float32.
        scale: Of the block; measured over these positions where it is None, and then no other batch's.
    """
    scale = scale or StateScale.of(teacher_ND)
    return scale.error(student_ND.float(), teacher_ND) * scale.position_weights(teacher_ND)


def hidden_cosine(student_ND: Tensor, teacher_ND: Tensor, _scale: StateScale | None = None) -> Tensor:
    """One minus the cosine of student and teacher, [N]: blind to scale."""
    return 1.0 - F.cosine_similarity(student_ND.float(), teacher_ND, dim=-1, eps=_SMALLEST_NORM)


HIDDEN_LOSSES: Mapping[HiddenLoss, Callable[[Tensor, Tensor, StateScale | None], Tensor]] = {
    "mse": hidden_mse,
    "normalised_mse": hidden_normalised_mse,
    "standardised_mse": hidden_standardised_mse,
    "cosine": hidden_cosine,
}
# Those that are measured by a scale of the block.
SCALED_LOSSES: tuple[HiddenLoss, ...] = ("standardised_mse",)
# What the squared error of a position weighs in each, about, given the teacher's states [N, D] and its scale.
POSITION_WEIGHTS: Mapping[HiddenLoss, Callable[[Tensor, StateScale | None], Tensor]] = {
    "mse": lambda teacher_ND, _: torch.ones_like(teacher_ND[:, 0]),
    "normalised_mse": lambda teacher_ND, _: 1.0 / teacher_ND.var(dim=-1, correction=0).clamp(min=_SMALLEST_VARIANCE),
    "standardised_mse": lambda teacher_ND, scale: (scale or StateScale.of(teacher_ND)).position_weights(teacher_ND),
    "cosine": lambda teacher_ND, _: 1.0 / teacher_ND.square().sum(dim=-1).clamp(min=_SMALLEST_NORM**2),
}
# What each is in.
HIDDEN_UNITS: Mapping[HiddenLoss, str] = {
    "mse": "mean squared error",
    "normalised_mse": "share of the teacher's variance",
    "standardised_mse": "share of the channels' variance",
    "cosine": "1 - cosine",
}
