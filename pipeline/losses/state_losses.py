"""Losses of a student's states against a teacher's, at each position. Pure tensor functions; all in float32.

Shapes: N positions that count, D width.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from coldstill.pipeline.recipe.loss import HiddenLoss

_SMALLEST_VARIANCE = 1e-12
_SMALLEST_NORM = 1e-8


def hidden_mse(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Mean squared error over channels, [N]: ruled by the positions and channels of largest scale."""
    return (student_ND.float() - teacher_ND).square().mean(dim=-1)


def hidden_normalised_mse(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Squared error of each position as a share of the teacher's variance over channels there, [N].

    1 is what a student that gives the teacher's mean over channels would get; a position of huge norm, such as the
    first of a row, counts as any other.
    """
    variance_N = teacher_ND.var(dim=-1, correction=0).clamp(min=_SMALLEST_VARIANCE)
    return (student_ND.float() - teacher_ND).square().mean(dim=-1) / variance_N


def hidden_cosine(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """One minus the cosine of student and teacher, [N]: blind to scale."""
    return 1.0 - F.cosine_similarity(student_ND.float(), teacher_ND, dim=-1, eps=_SMALLEST_NORM)


HIDDEN_LOSSES: Mapping[HiddenLoss, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": hidden_mse,
    "normalised_mse": hidden_normalised_mse,
    "cosine": hidden_cosine,
}
# What the squared error of a position weighs in each, about, given the teacher's states [N, D].
POSITION_WEIGHTS: Mapping[HiddenLoss, Callable[[Tensor], Tensor]] = {
    "mse": lambda teacher_ND: torch.ones_like(teacher_ND[:, 0]),
    "normalised_mse": lambda teacher_ND: 1.0 / teacher_ND.var(dim=-1, correction=0).clamp(min=_SMALLEST_VARIANCE),
    "cosine": lambda teacher_ND: 1.0 / teacher_ND.square().sum(dim=-1).clamp(min=_SMALLEST_NORM**2),
}
# What each is in.
HIDDEN_UNITS: Mapping[HiddenLoss, str] = {
    "mse": "mean squared error",
    "normalised_mse": "share of the teacher's variance",
    "cosine": "1 - cosine",
}
