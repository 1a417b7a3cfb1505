"""How far stored values are from the live teacher's, and whether that is within what their column states. No I/O.

An element is held to its bound, ten times the noise, and rounding; the noise is how far two live runs of the teacher
differ.
Shapes: N positions of some rows, P of these that are stored, K stored tokens, C positions of a chunk, D width,
V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from coldstill.pipeline.losses.logits_targets import FullDistribution
from coldstill.pipeline.models.output_head import OutputHead
from coldstill.pipeline.targets.transform_coding import TransformCode

SHARE, NATS, KL = "variance share", "nats", "KL in nats"

_NOISE_MARGIN = 10.0
# What float32 sums over a model's width may lose, in units of its rounding.
_FLOAT32_ROUNDINGS = 32
_SMALLEST_VARIANCE = 1e-12

Arrays = Mapping[str, Tensor]
# What a column is held against, each row run alone, and rows run side by side.
Live = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Difference:
    """One column beside the teacher, at the P positions that are stored.

    Attributes:
        error: In the column's measure, [P] or [P, K].
        noise: The same measure between two live runs.
        excess_P: How far a position's worst element is beyond what is allowed; at most 0 where all are within.
        kept_N: Which positions these are.
    """

    error: Tensor
    noise: Tensor
    excess_P: Tensor
    kept_N: Tensor


@dataclass(frozen=True)
class Comparison:
    """What stored columns are compared by, all on the teacher's device.

    Attributes:
        head: The teacher's output head.
        stored_head: The one that the store keeps, by which training rebuilds logits.
        codes: The transform code of each coded column, by its name.
        corrections: What is added to the rebuilt logits of each coded final state, by its name.
        dtype: Of the teacher's forward.
    """

    head: OutputHead
    stored_head: OutputHead
    codes: Mapping[str, TransformCode]
    corrections: Mapping[str, Tensor]
    dtype: torch.dtype

    def excess(self, apart: Tensor, noise: Tensor, stated: Tensor, scale: Tensor) -> Tensor:
        """Return how far each element is beyond what is stated, ten times the noise, and rounding at its scale."""
        rounding = torch.finfo(self.dtype).eps + _FLOAT32_ROUNDINGS * torch.finfo(torch.float32).eps
        return apart.abs() - stated - _NOISE_MARGIN * noise.abs() - rounding * scale

    def of_logits(self, apart: Tensor, noise: Tensor, alone: Tensor, *, kept_N: Tensor, stated: float) -> Difference:
        """Hold logits to the largest noise of all: that of a single number may be zero by chance.

        Args:
            apart: The stored logits less those of the first live run, [P] or [P, K].
            noise: Those of the second live run less those of the first.
            alone: Those of the first.
            kept_N: Which positions these are.
            stated: The error that the column states.
        """
        if not len(apart):
            return Difference(apart, noise, apart, kept_N)
        excess = self.excess(apart, noise.abs().max(), torch.full_like(apart, stated), alone.abs().max())
        return Difference(apart.abs(), noise.abs(), excess.reshape(len(apart), -1).amax(dim=-1), kept_N)


def variance_share(got_PD: Tensor, live_PD: Tensor) -> Tensor:
    """Return the squared error as a share of the live variance over channels, [P]."""
    variance_P = live_PD.var(dim=-1, correction=0).clamp(min=_SMALLEST_VARIANCE)
    return (got_PD - live_PD).square().mean(dim=-1) / variance_P


def logits_of(head: OutputHead, state_ND: Tensor, ids_NK: Tensor, *, k: int = 0) -> tuple[Tensor, Tensor]:
    """Return the logits of some tokens of each position, and the k largest, descending."""
    chosen, ranked = [], []
    for chunk in head.chunks(len(state_ND)):
        logits_CV = head(state_ND[chunk])
        chosen.append(logits_CV.gather(-1, ids_NK[chunk]))
        ranked.append(logits_CV.topk(k, dim=-1).values)
    return torch.cat(chosen), torch.cat(ranked)


def divergences(
    head: OutputHead, alone_PD: Tensor, together_PD: Tensor, rebuilt: FullDistribution
) -> tuple[Tensor, Tensor]:
    """Return KL(live || rebuilt) and KL(live || live again) in nats at temperature 1, [P] each."""
    error_P, noise_P = torch.zeros(2, len(alone_PD), device=alone_PD.device)
    for chunk in head.chunks(len(alone_PD)):
        live_CV = head(alone_PD[chunk]).log_softmax(dim=-1)
        error_P[chunk] = _kl(live_CV, rebuilt.logprobs(chunk))
        noise_P[chunk] = _kl(live_CV, head(together_PD[chunk]).log_softmax(dim=-1))
    return error_P, noise_P


def _kl(live_CV: Tensor, other_CV: Tensor) -> Tensor:
    return (live_CV.exp() * (live_CV - other_CV)).sum(dim=-1).clamp(min=0.0)
