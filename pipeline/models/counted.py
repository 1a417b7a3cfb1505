"""The positions of a batch that count, as numbers of places: what is taken by them asks a GPU nothing.

A mask says which positions count, and not how many. Who takes values by a mask has to know how many, and waits until
the GPU has done all that it was given. Places are found where a batch is made, in the memory of the host, and go to the
device with it.
Shapes: B rows, T positions, N positions that count.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from coldstill.pipeline.models.labels import counts_of

# What a batch calls the places at which the next token counts; and those of them at which block outputs are stored.
COUNTED, COUNTED_STATES = "counted", "counted_states"


def places_of(mask_BT: Tensor) -> Tensor:
    """Return where a mask is True, int64 [N], in rows laid one behind the other; on a GPU it waits."""
    return mask_BT.flatten().nonzero().squeeze(1)


def counted_of(batch: Mapping[str, Any]) -> Tensor:
    """Return at which places of a batch the token that follows counts, int64 [N]: the batch's own, or found.

    Raises:
        DataError: Labels or weights are not one for each token id.
    """
    given = batch.get(COUNTED)
    return places_of(counts_of(batch)) if given is None else given


def at(values_BT: Tensor, places_N: Tensor) -> Tensor:
    """Return values [B, T, ...] at some places, [N, ...], with their gradient."""
    return values_BT.flatten(0, 1).index_select(0, places_N)


def numbers_on(values: Sequence[float], device: torch.device) -> Tensor:
    """Return numbers as float32 on a device, which nobody waits for: a GPU fetches them from pinned memory."""
    return torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)
