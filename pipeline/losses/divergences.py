"""How far a student's next-token distribution is from the teacher's, as a sum over events. Pure tensor functions.

An event is a token, or several tokens taken together. Where events are draws, each counts its importance weight, and
the sum is an unbiased estimate of the one over the whole vocabulary. Every divergence here is a sum of terms that are
never negative and are zero, with their gradient, where both probabilities agree: p log(p / q) - p + q in place of
p log(p / q), which is the same in sum. So an estimate is never negative either, and a student that equals its teacher
is a fixed point for every draw, not only in expectation.

p is the teacher's probability, q the student's. Everything is in float32 and in nats.
Shapes: N positions, E events.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from coldstill.pipeline.recipe.loss import DIVERGENCE_WEIGHTS, DivergenceName, LossConfig

# exp of it is 0 in float32, and its product with 0 is 0 where that of minus infinity is not a number.
_LOWEST_LOGPROB = -1e4


@dataclass(frozen=True)
class Events:
    """The two distributions over the same events.

    Attributes:
        teacher_logprobs_NE: log p.
        student_logprobs_NE: log q, with the student's gradient.
        weights_NE: How often each event counts; None where each counts once and together they are everything.
        num_tokens: Events that are single tokens, the first ones, the likeliest first; None where all are, in no order.
    """

    teacher_logprobs_NE: Tensor
    student_logprobs_NE: Tensor
    weights_NE: Tensor | None = None
    num_tokens: int | None = None


@dataclass(frozen=True)
class Divergence:
    """A divergence by name, with its parameters.

    Attributes:
        name: One of `DIVERGENCES`.
        weight: Of `jensen_shannon`, `skewed_kl` and `bidirectional`, see there; the recipe's default where it is None.
        selective_k: Of `selective`: how many of the teacher's likeliest tokens count.
        selective_entropy: Of `selective`: positions whose teacher entropy, in nats, is not above it count as zero.
    """

    name: DivergenceName = "forward_kl"
    weight: float | None = None
    selective_k: int = 16
    selective_entropy: float = 0.0

    @classmethod
    def of(cls, section: LossConfig) -> Self:
        """Make the divergence of a recipe's loss section."""
        return cls(section.divergence, section.divergence_weight, section.selective_k, section.selective_entropy)

    @property
    def summary(self) -> str:
        """Its name, with the parameters that it has."""
        if self.name == "selective":
            return f"selective (k = {self.selective_k}, entropy above {self.selective_entropy:g})"
        return self.name if self.name not in DIVERGENCE_WEIGHTS else f"{self.name} (weight {self._weight:g})"

    @property
    def _weight(self) -> float:
        return DIVERGENCE_WEIGHTS.get(self.name, 0.0) if self.weight is None else self.weight

    def __call__(self, events: Events) -> Tensor:
        """Return the divergence at each position, [N]."""
        log_p, log_q = (
            values.clamp(min=_LOWEST_LOGPROB) for values in (events.teacher_logprobs_NE, events.student_logprobs_NE)
        )
        if self.name == "selective":
            return self._selective(log_p, log_q, events)
        if self.name == "forward_kl" and events.weights_NE is None:
            return (log_p.exp() * (log_p - log_q)).sum(dim=-1)  # what cancels in the sum is not computed
        return _sum(DIVERGENCES[self.name](log_p, log_q, self._weight), events.weights_NE)

    def _selective(self, log_p: Tensor, log_q: Tensor, events: Events) -> Tensor:
        entropy_N = _sum(-log_p.exp() * log_p, events.weights_NE)
        if events.num_tokens is None:
            top = log_p.topk(min(self.selective_k, log_p.shape[-1]), dim=-1)
            log_p, log_q = top.values, log_q.gather(-1, top.indices)
        else:
            count = min(self.selective_k, events.num_tokens)
            log_p, log_q = log_p[..., :count], log_q[..., :count]
        return forward_kl(log_p, log_q).sum(dim=-1) * (entropy_N > self.selective_entropy)


def forward_kl(log_p: Tensor, log_q: Tensor, _weight: float = 0.0) -> Tensor:
    """Return the terms of KL(p || q)."""
    return _kl_terms(log_p, log_q)


def reverse_kl(log_p: Tensor, log_q: Tensor, _weight: float = 0.0) -> Tensor:
    """Return the terms of KL(q || p), which sends the student to the teacher's modes (MiniLLM, arXiv 2306.08543)."""
    return _kl_terms(log_q, log_p)


def jensen_shannon(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """Return the terms of weight KL(p || m) + (1 - weight) KL(q || m), m = weight p + (1 - weight) q.

    The generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, equation 1).
    """
    log_m = _mixture(log_p, log_q, weight)
    return weight * _kl_terms(log_p, log_m) + (1 - weight) * _kl_terms(log_q, log_m)


def skewed_kl(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """Return the terms of KL(p || weight p + (1 - weight) q), the skewed KL of DistiLLM (arXiv 2402.03898)."""
    return _kl_terms(log_p, _mixture(log_p, log_q, weight))


def bidirectional(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """Return the terms of weight KL(p || q) + (1 - weight) KL(q || p)."""
    return weight * _kl_terms(log_p, log_q) + (1 - weight) * _kl_terms(log_q, log_p)


def total_variation(log_p: Tensor, log_q: Tensor, _weight: float = 0.0) -> Tensor:
    """Return the terms of half the sum of |p - q|."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs()


DIVERGENCES: Mapping[DivergenceName, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skewed_kl": skewed_kl,
    "bidirectional": bidirectional,
    "selective": forward_kl,
    "total_variation": total_variation,
}


def _kl_terms(log_a: Tensor, log_b: Tensor) -> Tensor:
    a = log_a.exp()
    return a * (log_a - log_b) - a + log_b.exp()


def _mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    return torch.logaddexp(log_p + math.log(weight), log_q + math.log(1 - weight))


def _sum(terms_NE: Tensor, weights_NE: Tensor | None) -> Tensor:
    return (terms_NE if weights_NE is None else terms_NE * weights_NE).sum(dim=-1)
