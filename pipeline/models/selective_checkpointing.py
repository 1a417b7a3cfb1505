"""Activation checkpointing that computes only the cheap operations again: matrix products and attention are kept.

About half of what a decoder block keeps for its backward pass are results of norms and of operations on single
elements. Computed again from the products, they cost a few percent of a step; full checkpointing costs a forward pass.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

# What the Trainer's arguments call it; a function among them could not be written to a log.
SELECTIVE = "selective"

_KEPT = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution", "aten::_grouped_mm"}
_KEPT_PREFIXES = ("aten::_scaled_dot_product", "aten::_flash_attention", "aten::_efficient_attention")


def selective_kwargs() -> dict[str, Any]:
    """Return the arguments that `torch.utils.checkpoint.checkpoint` takes for it."""
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
    return {"use_reentrant": False, "context_fn": contexts}


def enable_of(model: PreTrainedModel | type[PreTrainedModel]) -> Callable[..., None]:
    """Return the method that enables checkpointing, which transformers before 5.23 has by an earlier name.

    Its first argument are those of `torch.utils.checkpoint.checkpoint`, or None.
    """
    return getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable


def _policy(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    name = operator.name().partition(".")[0] if isinstance(operator, torch._ops.OpOverload) else ""
    is_kept = name in _KEPT or name.startswith(_KEPT_PREFIXES)
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
