"""The few numbers of each position's logits that losses over the vocabulary are made of, with one gradient for all.

Cross entropy and every divergence over chosen tokens need some logits, logsumexps at one or two temperatures, and
perhaps the logsumexp of the tokens beyond those chosen. Taken one by one with torch's own gradients they would pass
over the vocabulary some thirty times. Here it is passed over twice: forward, exponentials are computed once, at the
highest temperature, and raised to a power for another one; backward, they become the gradient in place. Rows are taken
a few at a time, so that the passes in between find them in the processor's cache.
Shapes: C positions of a chunk, G gathered tokens, K bucketed ones among them, R temperatures, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coldstill.pipeline.models.row_blocks import row_blocks

# The least sum that can be divided by without an overflow.
_SMALLEST = 1e-30


@dataclass(frozen=True)
class Sought:
    """What to take of the logits at a chunk of positions.

    Attributes:
        ids_CG: The tokens whose logits to give, int64.
        temperatures: Where to give the logsumexp over the vocabulary.
        num_bucketed: So many of the last tokens are set apart: the logsumexp of all others is given, at the first
            temperature. They are all different. 0 for no such number.
        teacher_logits_CV: The teacher's logits, float32 and free to be overwritten, for the KL at the first
            temperature; None for no such number. Not together with bucketed tokens.
        overwrites: Whether the student's logits may be overwritten too, which saves as much memory as they take.
    """

    ids_CG: Tensor
    temperatures: tuple[float, ...]
    num_bucketed: int = 0
    teacher_logits_CV: Tensor | None = None
    overwrites: bool = False


@dataclass(frozen=True)
class LogitsStatistics:
    """What was taken; carries the gradient of the logits.

    Attributes:
        logits_CG: The logits of the tokens.
        normaliser_CR: The logsumexp of logits / T over the vocabulary, for each temperature.
        rest_C: The logsumexp of logits / T over all tokens but the bucketed ones; None where there are none.
        kl_C: KL(teacher || student) at the first temperature; None where there is no teacher.
    """

    logits_CG: Tensor
    normaliser_CR: Tensor
    rest_C: Tensor | None
    kl_C: Tensor | None


def logits_statistics(logits_CV: Tensor, sought: Sought) -> LogitsStatistics:
    """Take what is sought of logits of any floating dtype, in float32 at least.

    A rest below 1e-30 of the likeliest token's probability is given as so much, without a gradient of its own.
    """
    logits_CG, normaliser_CR, rest_C, kl_C = _Statistics.apply(logits_CV, sought)
    return LogitsStatistics(
        logits_CG,
        normaliser_CR,
        rest_C if sought.num_bucketed else None,
        kl_C if sought.teacher_logits_CV is not None else None,
    )


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_CV: Tensor, sought: Sought) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert sought.teacher_logits_CV is None or not sought.num_bucketed
        wide = torch.promote_types(logits_CV.dtype, torch.float32)
        logits_CG = logits_CV.gather(-1, sought.ids_CG).to(wide)
        # Exponentials at the highest temperature; at T they are these to the power of highest / T.
        highest = max(sought.temperatures)
        is_in_place = sought.overwrites and logits_CV.dtype == wide
        exps_CV = logits_CV.detach() if is_in_place else torch.empty_like(logits_CV, dtype=wide)
        maximum_C1 = exps_CV.new_empty(len(exps_CV), 1)
        sums_RC = [exps_CV.new_empty(len(exps_CV)) for _ in sought.temperatures]
        rest_C, kl_C = exps_CV.new_ones(len(exps_CV)), exps_CV.new_zeros(len(exps_CV))
        teacher_sum_C = torch.ones_like(kl_C)
        for block in row_blocks(exps_CV):
            exps = exps_CV[block]
            if not is_in_place:
                exps.copy_(logits_CV[block])
            maximum_C1[block] = exps.amax(dim=-1, keepdim=True)
            exps.sub_(maximum_C1[block])
            if sought.teacher_logits_CV is not None:
                teacher = sought.teacher_logits_CV[block]
                teacher_sum_C[block], kl_C[block] = _compare(teacher, exps, sought.temperatures[0])
            if highest != 1.0:
                exps.div_(highest)
            exps.exp_()
            for sums_C, temperature in zip(sums_RC, sought.temperatures, strict=True):
                sums_C[block] = _power(exps, highest / temperature).sum(dim=-1)
            if sought.num_bucketed:
                ids_CK = sought.ids_CG[block, -sought.num_bucketed :]
                rest_C[block] = _sum_without(exps, ids_CK, highest / sought.temperatures[0])
        ctx.sought, ctx.highest, ctx.exps_CV = sought, highest, exps_CV
        ctx.given_CV = logits_CV.detach() if sought.overwrites and not is_in_place else None
        ctx.sums_RC, ctx.rest_C, ctx.teacher_sum_C = sums_RC, rest_C, teacher_sum_C
        normaliser_CR = torch.stack(
            [
                sums_C.log() + maximum_C1.squeeze(-1) / temperature
                for sums_C, temperature in zip(sums_RC, sought.temperatures, strict=True)
            ],
            dim=-1,
        )
        rest_C = rest_C.clamp(min=_SMALLEST).log() + maximum_C1.squeeze(-1) / sought.temperatures[0]
        # log p - log q, before the normalisers of both, was taken from each token's difference: no digits are lost.
        kl_C = kl_C - teacher_sum_C.log() + sums_RC[0].log()
        return logits_CG, normaliser_CR, rest_C, kl_C

    @staticmethod
    def backward(
        ctx: Any, of_logits_CG: Tensor, of_normaliser_CR: Tensor, of_rest_C: Tensor, of_kl_C: Tensor
    ) -> tuple[Tensor, None]:
        sought, gradient_CV = ctx.sought, ctx.exps_CV
        ctx.exps_CV = None
        first = sought.temperatures[0]
        # What each exponential at each temperature is multiplied by.
        factors = {
            temperature: (of_C / (sums_C * temperature)).unsqueeze(-1)
            for temperature, of_C, sums_C in zip(
                sought.temperatures, of_normaliser_CR.unbind(dim=-1), ctx.sums_RC, strict=True
            )
        }
        if sought.teacher_logits_CV is not None:
            factors[first] = factors[first] + (of_kl_C / (ctx.sums_RC[0] * first)).unsqueeze(-1)
        bucket_CK = None
        if sought.num_bucketed:
            # The bucketed tokens are none of the rest: their gradient is made without its factor.
            ids_CK = sought.ids_CG[:, -sought.num_bucketed :]
            bucket_CK = gradient_CV.gather(-1, ids_CK)
            _weigh(bucket_CK, factors, ctx.highest)
            of_rest_C = torch.where(ctx.rest_C > _SMALLEST, of_rest_C / (ctx.rest_C * first), 0.0)
            factors[first] = factors[first] + of_rest_C.unsqueeze(-1)
        for block in row_blocks(gradient_CV):
            _weigh(gradient_CV[block], {t: values[block] for t, values in factors.items()}, ctx.highest)
            if sought.teacher_logits_CV is not None:
                of_teacher_C1 = (of_kl_C / (ctx.teacher_sum_C * first))[block].unsqueeze(-1)
                gradient_CV[block].addcmul_(sought.teacher_logits_CV[block], of_teacher_C1, value=-1.0)
        if bucket_CK is not None:
            gradient_CV.scatter_(-1, ids_CK, bucket_CK)
        gradient_CV.scatter_add_(-1, sought.ids_CG, of_logits_CG)
        return gradient_CV if ctx.given_CV is None else ctx.given_CV.copy_(gradient_CV), None


def _power(exps: Tensor, ratio: float) -> Tensor:
    """Return exponentials at the highest temperature at another one, the highest over `ratio`."""
    if ratio == 1.0:
        return exps
    return exps.square() if ratio == 2.0 else exps.pow(ratio)


def _compare(teacher: Tensor, shifted: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Turn the teacher's logits into exponentials in place; return their sum and mean difference to the student's."""
    teacher.sub_(teacher.amax(dim=-1, keepdim=True)).div_(temperature)
    difference = torch.sub(teacher, shifted, alpha=1.0 / temperature)
    total = teacher.exp_().sum(dim=-1)
    return total, difference.mul_(teacher).sum(dim=-1) / total


def _sum_without(exps: Tensor, ids_CK: Tensor, ratio: float) -> Tensor:
    """Sum exponentials over the tokens but some: by subtraction, all digits would go where the student is sure."""
    if ratio != 1.0:
        return _power(exps, ratio).scatter(-1, ids_CK, 0.0).sum(dim=-1)
    kept_CK = exps.gather(-1, ids_CK)
    total = exps.scatter_(-1, ids_CK, 0.0).sum(dim=-1)
    exps.scatter_(-1, ids_CK, kept_CK)
    return total


def _weigh(exps: Tensor, factors: dict[float, Tensor], highest: float) -> None:
    """Turn exponentials in place into their sum over temperatures, each with its factor."""
    others = {temperature: factor for temperature, factor in factors.items() if temperature != highest}
    if len(others) == 1 and highest in factors and highest == 2 * next(iter(others)):
        # e^2 a + e b = e (e a + b)
        (factor,) = others.values()
        exps.mul_(torch.mul(exps, factor).add_(factors[highest]))
        return
    weighed = [_power(exps, highest / temperature) * factor for temperature, factor in others.items()]
    exps.mul_(factors[highest])
    for values in weighed:
        exps.add_(values)
