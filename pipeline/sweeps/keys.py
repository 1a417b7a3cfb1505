"""Which recipes of a sweep give the same result: those are one run, with one key.

A key is a digest of what changes a result: teacher, data, student, targets, mapping, projector, loss and training, with
the seed. Not of where things are or how they are carried out: output, cache, batch size of the teacher, devices,
workers, logging, saving; nor of how models are judged, which a trained student can be again. What has no effect does
not count either: without hidden terms the mapping, the projectors and the stored blocks, without a divergence the
stored logits and the temperature, with one term its balance with others. It is known before stage one, so local files
count by where they lie, however that is written: a model or text that was replaced in its place is noticed by stage
two.
"""

import os
from pathlib import Path
from typing import Any

from coldstill.cache.identity import digest_of
from coldstill.pipeline.outputs.run_index import rows_key
from coldstill.pipeline.recipe.loss import TERM_KEYS, LossConfig
from coldstill.pipeline.recipe.sections import (
    HiddenTargetConfig,
    LogitsTargetConfig,
    MappingConfig,
    ProjectorConfig,
    Recipe,
)
from coldstill.pipeline.stage_two.run_folder import decisive_sections

_KEY_CHARS = 12
_LOCAL_KEYS = ("path", "data_dir", "data_files")


def canonical(recipe: Recipe) -> Recipe:
    """Return the recipe with the same result whose idle sections are as they are by default, or keep nothing."""
    loss, targets = recipe.loss, recipe.targets
    without_effect = [key for term, keys in TERM_KEYS.items() if term not in loss.terms for key in keys.options]
    idle = {key: LossConfig.model_fields[key].default for key in without_effect}
    if len(loss.terms) == 1:
        idle["balance"] = LossConfig.model_fields["balance"].default
    if not loss.needs_logits:
        idle["schedule"] = loss.schedule.model_copy(update={"temperature": None})
        targets = targets.model_copy(update={"logits": LogitsTargetConfig(kind="none")})
    changes: dict[str, Any] = {"loss": loss.model_copy(update=idle)}
    if not loss.needs_hidden:
        targets = targets.model_copy(update={"hidden": HiddenTargetConfig(blocks="none")})
        changes |= {"mapping": MappingConfig(), "projector": ProjectorConfig()}
    if recipe.student.path is not None:
        changes["student"] = recipe.student.model_copy(update={"path": _plain(recipe.student.path)})
    return recipe.model_copy(update={**changes, "targets": targets})


def sweep_key(recipe: Recipe) -> str:
    """Name the run of a recipe; the same for all recipes that give its result."""
    sections = {**decisive_sections(canonical(recipe)), **rows_key(recipe)}
    sections["teacher"] = _with_plain_paths(sections["teacher"])
    sections["data"] |= {split: _with_plain_paths(sections["data"][split]) for split in ("train", "eval")}
    del sections["student"]["trust_remote_code"]
    return digest_of(sections)[:_KEY_CHARS]


def _with_plain_paths(section: Any) -> Any:
    if isinstance(section, list):
        return [_with_plain_paths(item) for item in section]
    return {key: _plain(value) if key in _LOCAL_KEYS else value for key, value in section.items()}


def _plain(value: Any) -> Any:
    """Write a path in one way, whether absolute or not; names on the hub and URLs stay as they are."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, str) or "://" in value:
        return value
    path = Path(os.path.normpath(value))
    return str(path.relative_to(Path.cwd()) if path.is_absolute() and path.is_relative_to(Path.cwd()) else path)
