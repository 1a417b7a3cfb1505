"""The three terms of the loss, as pure tensor functions. No config, no I/O.

Position t predicts token t+1; the caller has shifted. Everything is computed in float32 and in nats. Each term is a sum
over positions divided by `num_positions`, which the caller may have counted over more than this batch, so that a batch
accumulated in parts has the loss and gradient of the whole.
Shapes: N positions that count, K stored tokens, V vocabulary, D width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_SMALLEST_VARIANCE = 1e-12
_SMALLEST_NORM = 1e-8


def cross_entropy(student_logits_NV: Tensor, next_tokens_N: Tensor, *, num_positions: Tensor | float) -> Tensor:
    """Cross entropy with the tokens that follow, in nats.

    Args:
        student_logits_NV: Of any floating dtype.
        next_tokens_N: Token ids, int64.
        num_positions: What the sum over the N positions is divided by.
    """
    return F.cross_entropy(student_logits_NV.float(), next_tokens_N, reduction="sum") / num_positions


def hidden_mse(student_ND: Tensor, teacher_ND: Tensor, *, num_positions: Tensor | float) -> Tensor:
    """Mean squared error over channels, summed over positions: ruled by the positions and channels of largest scale."""
    return (student_ND.float() - teacher_ND).square().mean(dim=-1).sum() / num_positions


def hidden_normalised_mse(student_ND: Tensor, teacher_ND: Tensor, *, num_positions: Tensor | float) -> Tensor:
    """Squared error of each position as a share of the teacher's variance over channels there.

    1 is what a student that gives the teacher's mean over channels would get; a position of huge norm, such as the
    first of a row, counts as any other.
    """
    variance_N = teacher_ND.var(dim=-1, correction=0).clamp(min=_SMALLEST_VARIANCE)
    return ((student_ND.float() - teacher_ND).square().mean(dim=-1) / variance_N).sum() / num_positions


def hidden_cosine(student_ND: Tensor, teacher_ND: Tensor, *, num_positions: Tensor | float) -> Tensor:
    """One minus the cosine of student and teacher, at each position: blind to scale."""
    return (1.0 - F.cosine_similarity(student_ND.float(), teacher_ND, dim=-1, eps=_SMALLEST_NORM)).sum() / num_positions


HIDDEN_LOSSES = {"mse": hidden_mse, "normalised_mse": hidden_normalised_mse, "cosine": hidden_cosine}
# What the squared error of a position weighs in each, about, given the teacher's states [N, D].
POSITION_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "mse": lambda teacher_ND: torch.ones_like(teacher_ND[:, 0]),
    "normalised_mse": lambda teacher_ND: 1.0 / teacher_ND.var(dim=-1, correction=0).clamp(min=_SMALLEST_VARIANCE),
    "cosine": lambda teacher_ND: 1.0 / teacher_ND.square().sum(dim=-1).clamp(min=_SMALLEST_NORM**2),
}
