"""Whether models carry hooks: torch has no public way to ask, so this one place knows where it keeps them."""

from torch import nn


def has_hooks(*models: nn.Module) -> bool:
    """Whether any module of some models has a hook in front of its forward or behind it."""
    return any(part._forward_hooks or part._forward_pre_hooks for model in models for part in model.modules())
