"""What stage one keeps of the teacher's logits: the largest ones, and logsumexps at several temperatures.

Shapes: N positions, K largest tokens, V vocabulary.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from coldstill.pipeline.models.row_blocks import row_blocks

_LARGEST_POWER = 24
# Tokens of a group whose maximum stands for it, and how many more groups than chosen ones make that worth it.
_GROUP = 64
_GROUPS_OVER_CHOSEN = 4


def largest_logits(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest logits, descending, and their token ids, [N, K] each.

    All of them lie in the k groups of neighbouring tokens whose maxima are largest: any other group's maximum has k
    maxima above it. So only these groups are sorted.
    """
    num_groups = logits_NV.shape[-1] // _GROUP
    if num_groups < _GROUPS_OVER_CHOSEN * k:
        top = logits_NV.topk(k, dim=-1)
        return top.values, top.indices
    grouped = logits_NV[:, : num_groups * _GROUP].unflatten(-1, (num_groups, _GROUP))
    # In the order of the tokens, so that equal logits are chosen alike whichever groups are.
    groups_NK = grouped.amax(dim=-1).topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values
    candidates = grouped.gather(1, groups_NK.unsqueeze(-1).expand(-1, -1, _GROUP)).flatten(1)
    ids = (groups_NK.unsqueeze(-1) * _GROUP + torch.arange(_GROUP, device=logits_NV.device)).flatten(1)
    rest = torch.arange(num_groups * _GROUP, logits_NV.shape[-1], device=logits_NV.device)
    candidates = torch.cat([candidates, logits_NV[:, num_groups * _GROUP :]], dim=-1)
    top = candidates.topk(k, dim=-1)
    return top.values, torch.cat([ids, rest.expand(len(ids), -1)], dim=-1).gather(-1, top.indices)


def logsumexp_at(logits_NV: Tensor, temperatures: Sequence[float]) -> dict[float, Tensor]:
    """Return the logsumexp of logits / T over the vocabulary for several temperatures, [N] in float32 each.

    exp(z / T) is exp(z / L) to the power of L / T: for whole temperatures, L is their least common multiple, and
    products take the place of exponentials.
    """
    if not temperatures:
        return {}
    maximum_N = torch.empty(len(logits_NV), device=logits_NV.device)
    sums_N = {temperature: torch.empty_like(maximum_N) for temperature in temperatures}
    common = _common_multiple(temperatures)
    for block in row_blocks(logits_NV):
        logits = logits_NV[block]
        maximum = logits.amax(dim=-1, keepdim=True)
        maximum_N[block] = maximum.squeeze(-1)
        if common:
            powers = {1: _shifted(logits, maximum, common).exp_()}
            for temperature in sorted(temperatures, reverse=True):
                sums_N[temperature][block] = _sum_of_power(powers, round(common / temperature))
        else:
            for temperature in temperatures:
                sums_N[temperature][block] = _shifted(logits, maximum, temperature).exp_().sum(dim=-1)
    return {temperature: values_N.log() + maximum_N / temperature for temperature, values_N in sums_N.items()}


def _shifted(logits: Tensor, maximum: Tensor, temperature: float) -> Tensor:
    """Return (z - maximum) / T in one pass."""
    return torch.add(maximum * (-1.0 / temperature), logits, alpha=1.0 / temperature)


def _common_multiple(temperatures: Sequence[float]) -> int:
    """Return the least common multiple of whole temperatures; 0 where there is none that a few products reach."""
    if not all(float(temperature).is_integer() for temperature in temperatures):
        return 0
    common = math.lcm(*map(int, temperatures))
    return common if common <= _LARGEST_POWER else 0


def _sum_of_power(powers: dict[int, Tensor], exponent: int) -> Tensor:
    """Sum a power over the vocabulary; of an even one, which is a sum of squares, the root is enough."""
    if exponent in powers or exponent % 2:
        return _power(powers, exponent).sum(dim=-1)
    return torch.linalg.vector_norm(_power(powers, exponent // 2), dim=-1).square_()


def _power(powers: dict[int, Tensor], exponent: int) -> Tensor:
    """Return a power from those that are there, and keep it and what led to it."""
    if exponent not in powers:
        half = exponent // 2
        powers[exponent] = _power(powers, half) * _power(powers, exponent - half)
    return powers[exponent]
