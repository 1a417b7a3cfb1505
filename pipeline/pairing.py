"""The layer map of a recipe for one student: the mapping section applied to a student's config."""

from transformers import PreTrainedConfig

from pipeline.config import MappingConfig
from pipeline.layer_map import create_layer_map, spread_pairs
from pipeline.models import kept_blocks_of, text_config


def layer_map_of(mapping: MappingConfig, student: PreTrainedConfig, *, num_teacher_blocks: int) -> dict[int, int]:
    """Give student block to teacher block, for the pairs that the recipe wants.

    Raises:
        RecipeError: The mapping does not fit these two models.
    """
    layer_map = create_layer_map(
        int(text_config(student).num_hidden_layers),
        num_teacher_blocks,
        mapping.strategy,
        kept_blocks=kept_blocks_of(student),
        pairs=mapping.pairs,
    )
    return spread_pairs(layer_map, mapping.num_pairs)
