"""How many positions a model reads, and whether the length of other rows changes what it makes of them.

LongRoPE (Phi-3; Ding et al., arXiv 2402.13753) turns the positions of a whole batch by its long factors once one row
is longer than the model was first trained on. A row's output then depends on who else is in the batch, so rows on the
two sides of such a length are never run together. `dynamic` factors change beyond `max_position_embeddings` only, and
no row is longer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from coldstill.pipeline.models.loading import text_config
from coldstill.pipeline.runtime.errors import RecipeError


def check_length(config: PreTrainedConfig, sequence_length: int, *, who: str) -> None:
    """Refuse rows that are longer than a model reads; `who` is the teacher or the student.

    Raises:
        RecipeError: They are.
    """
    longest = getattr(text_config(config), "max_position_embeddings", None)
    if longest is not None and sequence_length > longest:
        raise RecipeError(
            f"data.sequence_length is {sequence_length}, but the {who} reads at most {longest} tokens "
            "(max_position_embeddings in its config)"
        )


def rope_switches(config: PreTrainedConfig) -> tuple[int, ...]:
    """Return the lengths beyond which a model turns positions by other factors, ascending; mostly there is none."""
    of_text = text_config(config)
    parameters: dict[str, Any] = getattr(of_text, "rope_parameters", None) or {}
    # Where kinds of layers have factors of their own, the parameters are a map of such maps.
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    lengths = {
        int(kind.get("original_max_position_embeddings") or of_text.max_position_embeddings)
        for kind in kinds
        if kind.get("rope_type") == "longrope"
    }
    return tuple(sorted(lengths))


def sides(lengths: Sequence[int], switches: Sequence[int]) -> list[int]:
    """Return for each length of a row how many switches it lies beyond: rows with one number may be run together."""
    return [sum(length > switch for switch in switches) for length in lengths]


def rows_by_side(inputs: Mapping[str, Any], switches: Sequence[int]) -> list[tuple[Tensor, int]]:
    """Return the rows of a batch that may be run together, as indices, and how many positions hold all of them.

    Args:
        inputs: `input_ids` [B, T], and `attention_mask` [B, T] and `position_ids` [B, T], or None.
        switches: What `rope_switches` gives of the model.

    Returns:
        Empty where the batch may be run as it is.
    """
    if not switches:
        return []
    ids_BT, mask_BT, positions_BT = (inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    assert ids_BT is not None
    whole = ids_BT.shape[1]
    real_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
    ends_B = (real_BT * torch.arange(1, whole + 1, device=ids_BT.device)).amax(dim=1)
    lengths_B = ends_B if positions_BT is None else (positions_BT + 1).masked_fill(~real_BT, 0).amax(dim=1)
    side_B = torch.tensor(sides(lengths_B.tolist(), switches), device=ids_BT.device)
    # Without positions of its own a batch is as long as its padding makes it.
    (side_as_it_is,) = sides([whole if positions_BT is None else int(lengths_B.max())], switches)
    if bool((side_B == side_as_it_is).all()):
        return []
    groups = [(side_B == side).nonzero().squeeze(1) for side in side_B.unique()]
    return [(rows, int(ends_B[rows].max())) for rows in groups]
