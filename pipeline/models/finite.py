"""NaN and infinity in large tensors, looked for in one pass that keeps nothing."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no number of some floating-point tensors, all on one device, is a NaN or an infinity.

    Each tensor is summed up: one pass that keeps nothing, after which the device is waited for once. A sum of finite
    numbers may overflow; only where one is not finite are the numbers themselves looked at.
    """
    tensors = list(tensors)
    if not tensors:
        return True
    sums = torch.stack([values.sum(dtype=torch.float32) for values in tensors])
    return bool(sums.isfinite().all()) or all(bool(values.isfinite().all()) for values in tensors)


def first_non_finite(state: Mapping[str, Tensor]) -> str | None:
    """Name the first tensor that holds a NaN or an infinity; None where all are finite, or have no numbers yet."""
    for name, values in state.items():
        if values.is_floating_point() and not values.is_meta:
            # One by one: a model's weights may lie on several devices. Of eight bits, torch adds up none.
            wide = values.float() if values.itemsize == 1 else values
            if not all_finite([wide]):
                return name
    return None
