"""Models: found, loaded whole, taken apart by structure, and held against each other's vocabulary."""

from coldstill.pipeline.models.finite import all_finite, first_non_finite
from coldstill.pipeline.models.identity import identify
from coldstill.pipeline.models.loading import (
    KEPT_BLOCKS,
    kept_blocks_of,
    kept_channels_of,
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
    resolve_folder,
    text_config,
)
from coldstill.pipeline.models.positions import check_length, rope_switches, rows_by_side, sides
from coldstill.pipeline.models.structure import (
    ModelParts,
    Structure,
    find_parts,
    find_structure,
    head_problem,
    take_apart,
)
from coldstill.pipeline.models.vocabularies import check_tokenizers, check_vocabularies

__all__ = [
    "KEPT_BLOCKS",
    "ModelParts",
    "Structure",
    "all_finite",
    "check_length",
    "check_tokenizers",
    "check_vocabularies",
    "find_parts",
    "find_structure",
    "first_non_finite",
    "head_problem",
    "identify",
    "kept_blocks_of",
    "kept_channels_of",
    "load_config",
    "load_model",
    "load_tokenizer",
    "resolve_device",
    "resolve_dtype",
    "resolve_folder",
    "rope_switches",
    "rows_by_side",
    "sides",
    "take_apart",
    "text_config",
]
