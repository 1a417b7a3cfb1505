"""Norms of fewer channels: the sliced copy of a norm, and its weight scaled whatever form the weight has.

Shapes: D channels, K of them kept.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn


def sliced_norm(norm: nn.Module, channels_K: Tensor) -> nn.Module:
    """Copy a norm over D channels for K of them."""
    sliced = copy.deepcopy(norm)
    for name, value in norm.named_parameters(recurse=False):
        setattr(sliced, name, nn.Parameter(value.detach()[channels_K.to(value.device)], requires_grad=False))
    if isinstance(sliced, nn.LayerNorm):
        sliced.normalized_shape = (len(channels_K),)
    return sliced


@torch.no_grad()
def scaled_weight(norm: Any, weight: Tensor, factor: float) -> Tensor:
    """Return the weight with which a norm gives `factor` times what it gives with `weight`.

    Gemma's norms multiply by one plus their weight, others by the weight: which of them this one is, it is asked.
    """
    probe = torch.ones(norm.weight.shape[0], dtype=norm.weight.dtype, device=norm.weight.device)
    probe[1::2] = -1.0  # its mean is zero, so that a norm that removes the mean gives the same
    multiplies_by = (norm(probe.unsqueeze(0)) - norm(-probe.unsqueeze(0)))[0].float() / (2.0 * probe.float())
    offset = float((multiplies_by - norm.weight.float()).mean().round())
    return ((weight.float() + offset) * factor - offset).to(weight.dtype)
