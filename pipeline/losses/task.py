"""`loss_task`: the cross entropy with the tokens that follow, in nats a position."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from coldstill.pipeline.losses.student_logits import Request, StudentEvents
from coldstill.pipeline.losses.term import Predictions, VocabularyTerm
from coldstill.pipeline.recipe.loss import TermName


@dataclass(frozen=True)
class Task(VocabularyTerm):
    """The cross entropy; needs nothing of the teacher."""

    name: ClassVar[TermName] = "loss_task"
    title: ClassVar[str] = "Task loss (cross entropy)"
    label: ClassVar[str] = "task (CE)"

    @property
    def summary(self) -> str:
        """What it compares."""
        return "cross entropy"

    @property
    def unit(self) -> str:
        """What it is measured in."""
        return "nats a token"

    def request(self, predictions: Predictions, chunk: slice) -> Request:
        """Ask for the next token's logit and the logsumexp at temperature 1."""
        return Request(1.0, predictions.next_tokens_N[chunk].unsqueeze(-1))

    def loss(self, predictions: Predictions, chunk: slice, student: StudentEvents) -> Tensor:
        """Return the sum over a chunk of positions."""
        if student.normaliser_C is None:
            weights_N = predictions.weights_N
            weights_C = None if weights_N is None else weights_N[chunk]
            return cross_entropy(student.logits_CE, predictions.next_tokens_N[chunk], weights_C)
        return predictions.total(chunk, student.normaliser_C - student.logits_CE[:, 0])


def cross_entropy(logits_NV: Tensor, next_tokens_N: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """Return the cross entropy with the tokens that follow, in nats, summed over positions.

    Args:
        logits_NV: The student's, of any floating dtype; computed in float32.
        next_tokens_N: Token ids, int64.
        weights_N: What each position weighs; None where each weighs 1.
    """
    if weights_N is None:
        return F.cross_entropy(logits_NV.float(), next_tokens_N, reduction="sum")
    logprobs_N1 = logits_NV.float().log_softmax(dim=-1).gather(-1, next_tokens_N.unsqueeze(-1))
    # Summed as `F.cross_entropy` sums: weights that are all 1 change no digit.
    return F.nll_loss(logprobs_N1 * weights_N.unsqueeze(-1), torch.zeros_like(next_tokens_N), reduction="sum")
