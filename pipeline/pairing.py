"""The layer map of a recipe for one student: the mapping section applied to a student's config."""

from collections.abc import Sequence

from transformers import PreTrainedConfig

from pipeline.config import MappingConfig
from pipeline.layer_map import create_layer_map, spread_pairs
from pipeline.models import kept_blocks_of, text_config


def layer_map_of(mapping: MappingConfig, student: PreTrainedConfig, *, num_teacher_blocks: int) -> dict[int, int]:
    """Give student block to teacher block, for the pairs that the recipe wants.

    Raises:
        RecipeError: The mapping does not fit these two models.
    """
    num_student_blocks = int(text_config(student).num_hidden_layers)
    return layer_map_between(mapping, num_student_blocks, num_teacher_blocks, kept_blocks=kept_blocks_of(student))


def layer_map_between(
    mapping: MappingConfig, num_student_blocks: int, num_teacher_blocks: int, *, kept_blocks: Sequence[int] | None
) -> dict[int, int]:
    """Give the same for models of so many blocks, which need not exist yet."""
    layer_map = create_layer_map(
        num_student_blocks, num_teacher_blocks, mapping.strategy, kept_blocks=kept_blocks, pairs=mapping.pairs
    )
    return spread_pairs(layer_map, mapping.num_pairs)
