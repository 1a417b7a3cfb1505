"""What was cut of a student, told from its record, from the recipe, or from the configs of both models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coldstill.pipeline.models import load_config, resolve_folder, text_config
from coldstill.pipeline.recipe.presets import Cut, cut_of
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.runtime.errors import ModelError
from coldstill.pipeline.students.pruning_record import describe_cut, is_narrower, was_cut


def what_was_cut(recipe: Recipe, folder: Path | None, pruning: Mapping[str, Any] | None) -> tuple[Cut, str]:
    """Name what was cut, and say how it is known: by the student's record, the recipe, or both models' configs."""
    if pruning is not None:
        cut = cut_of(is_deep=was_cut(pruning, "blocks"), is_wide=is_narrower(pruning))
        return cut, describe_cut(pruning)
    if recipe.student.prune is not None:
        return recipe.student.cut, f"{in_words(recipe.student.cut)} is cut, by student.prune"
    try:
        teacher = resolve_folder(recipe.teacher.path, revision=recipe.teacher.revision, local_only=True)
        configs = [text_config(load_config(path)) for path in (teacher, folder) if path is not None]
    except ModelError:
        configs = []
    if len(configs) < 2:
        return "both", "what was cut is not known, and taken for depth and width"
    is_deep, *are_narrow = (
        getattr(configs[1], size, 0) < getattr(configs[0], size, 0)
        for size in ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size")
    )
    cut = cut_of(is_deep=is_deep, is_wide=any(are_narrow))
    return cut, f"{in_words(cut)} was cut, by the configs of both models"


def in_words(cut: Cut) -> str:
    """Name a cut as a sentence does."""
    return "depth and width" if cut == "both" else cut
