"""How many positions a model reads, and whether the length of other rows changes what it makes of them.

LongRoPE (Phi-3; Ding et al., arXiv 2402.13753) turns the positions of a whole batch by its long factors once one row
is longer than the model was first trained on. A row's output then depends on who else is in the batch, so rows on the
two sides of such a length are never run together. `dynamic` factors change beyond `max_position_embeddings` only, and
no row is longer.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from cache.errors import RecipeError
from pipeline.models.loading import text_config


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
    """Give the lengths beyond which a model turns positions by other factors, ascending; mostly there is none."""
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
    """Give for each length of a row how many switches it lies beyond: rows with one number may be run together."""
    return [sum(length > switch for switch in switches) for length in lengths]


def rows_by_side(attention_mask_BT: Tensor | None, switches: Sequence[int]) -> list[tuple[Tensor, int]]:
    """Give the rows of a padded batch that may be run together, as indices and the length of the longest of them.

    Empty where all of them may.
    """
    if attention_mask_BT is None or not switches:
        return []
    lengths_B = attention_mask_BT.sum(dim=1)
    side_B = sum(lengths_B > switch for switch in switches)
    assert isinstance(side_B, Tensor)
    if bool((side_B == side_B[0]).all()):
        return []
    groups = [(side_B == side).nonzero().squeeze(1) for side in side_B.unique()]
    return [(rows, int(lengths_B[rows].max())) for rows in groups]
