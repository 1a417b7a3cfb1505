"""The layer map of a recipe for one student: the mapping section applied to a student's config."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedConfig

from coldstill.pipeline.models import kept_blocks_of, text_config
from coldstill.pipeline.models.layer_map import create_layer_map, spread_pairs
from coldstill.pipeline.recipe.sections import MappingConfig, Recipe
from coldstill.pipeline.runtime.errors import RecipeError


def layer_map_of(mapping: MappingConfig, student: PreTrainedConfig, *, num_teacher_blocks: int) -> dict[int, int]:
    """Return student block to teacher block, for the pairs that the recipe wants.

    Raises:
        RecipeError: The mapping does not fit these two models.
    """
    num_student_blocks = int(text_config(student).num_hidden_layers)
    return layer_map_between(mapping, num_student_blocks, num_teacher_blocks, kept_blocks=kept_blocks_of(student))


def layer_map_between(
    mapping: MappingConfig, num_student_blocks: int, num_teacher_blocks: int, *, kept_blocks: Sequence[int] | None
) -> dict[int, int]:
    """Return the same for models of so many blocks, which need not exist yet."""
    layer_map = create_layer_map(
        num_student_blocks, num_teacher_blocks, mapping.strategy, kept_blocks=kept_blocks, pairs=mapping.pairs
    )
    return spread_pairs(layer_map, mapping.num_pairs)


def check_layer_map(recipe: Recipe, layer_map: Mapping[int, int], *, is_decided: bool = True) -> None:
    """Refuse a layer map with too few pairs for the loss, or with blocks that the recipe does not store.

    Args:
        recipe: The recipe.
        layer_map: Student block to teacher block.
        is_decided: Whether its teacher blocks are the real ones; only their number is known where they are not.

    Raises:
        RecipeError: It has one pair where changes between pairs count, or a block that is not among those to store.
    """
    if recipe.loss.ever("delta") and len(layer_map) < 2:
        raise RecipeError(
            "loss.delta compares changes from one mapped block to the next, but the mapping has one pair: map more, or "
            "set loss.delta to 0"
        )
    stored = recipe.targets.hidden.blocks
    if is_decided and isinstance(stored, list):
        lacking = sorted(set(layer_map.values()) - set(stored))
        if lacking:
            raise RecipeError(
                f"the mapping needs teacher block {lacking[0]}, but targets.hidden.blocks stores {stored}"
            )
