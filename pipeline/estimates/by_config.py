"""What stage one costs with a teacher whose weights are not here: by its config alone, on a machine that is described.

The arithmetic stands in docs/plan.md.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from coldstill.cache import laying
from coldstill.cache.manifest import Manifest
from coldstill.cache.objects import open_objects
from coldstill.cache.store import Store
from coldstill.pipeline.estimates.machine_costs import Machine, PlacementCost, TeacherTask
from coldstill.pipeline.estimates.teacher_memory import waiting_bytes_per_token
from coldstill.pipeline.estimates.token_work import TokenWork
from coldstill.pipeline.models import load_config, resolve_folder
from coldstill.pipeline.models.outlines import outline_of
from coldstill.pipeline.models.placement import WeightBytes
from coldstill.pipeline.models.sizes import ModelSizes
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.runtime.errors import ModelError, RecipeError
from coldstill.pipeline.stage_one.preflight import planned_layer_map
from coldstill.pipeline.stage_one.requests import SPLITS, check_targets, require_stored
from coldstill.pipeline.targets.captured import union_of
from coldstill.pipeline.targets.states import BlockOutput
from coldstill.pipeline.targets.target import Target, TeacherTarget
from coldstill.pipeline.targets.wanted import wanted_targets


@dataclass(frozen=True)
class StoredColumn:
    """A column of the store that would be written.

    Attributes:
        name: Its name; of mapped blocks that only pruning decides, that of all of them together.
        num_tokens: Tokens that have it.
        most_bytes: Before compression.
        about_bytes: By the share that compression leaves of real models' columns.
    """

    name: str
    num_tokens: int
    most_bytes: int
    about_bytes: int


@dataclass(frozen=True)
class ConfigPlan:
    """What stage one would cost, by the teacher's config.

    Attributes:
        architecture: The model's class.
        dtype: That it runs in.
        num_parameters: How many.
        num_blocks: Decoder blocks.
        machine: What it would run on.
        num_tokens: Tokens of each split.
        flops_per_token: Of each split: blocks, and the output head where a column needs logits.
        columns: What the store would hold for each token.
        constant_bytes: What it would hold once: the output head and calibrations.
        about_bytes: The store in all.
        most_bytes: The same before compression.
        write_hours: What writing it takes at the machine's disk rate, beside the work.
        placements: Both placements.
    """

    architecture: str
    dtype: str
    num_parameters: int
    num_blocks: int
    machine: Machine
    num_tokens: Mapping[str, int]
    flops_per_token: Mapping[str, float]
    columns: list[StoredColumn]
    constant_bytes: int
    about_bytes: int
    most_bytes: int
    write_hours: float
    placements: list[PlacementCost]


def plan_by_config(recipe: Recipe, machine: Machine, *, num_tokens: int | None = None) -> ConfigPlan:
    """Work out what stage one of a recipe would cost, by its teacher's config; no weights are read, and none needed.

    Args:
        recipe: The recipe.
        machine: What it would run on.
        num_tokens: Tokens of its train rows; by default those of `data.train.max_rows` rows of full length.

    Raises:
        RecipeError: The recipe does not fit such a teacher, or says no number of tokens.
        ModelError: There is no such config, or the weights that it speaks of are quantised.
    """
    require_stored([recipe])
    teacher = _located(recipe)
    check_targets(recipe, teacher)
    tokens = _tokens(recipe, num_tokens)
    outline = outline_of(teacher.config, trust_remote_code=recipe.teacher.trust_remote_code)
    wanted = _wanted(recipe, teacher)
    sizes, work = ModelSizes.of(teacher.config), TokenWork.of(outline, length=recipe.data.sequence_length)
    weights = WeightBytes.of_outline(outline, dtype=teacher.dtype)
    needs = {split: union_of(target.needs for target in _of_teacher(targets)) for split, targets in wanted.items()}
    heads = {split: work.head_flops if needed.needs_logits else 0.0 for split, needed in needs.items()}
    task = TeacherTask(
        machine=machine,
        weights=weights,
        waiting_bytes=waiting_bytes_per_token(sizes, teacher.dtype),
        work_bytes=_work_bytes(recipe, teacher, wanted, work),
        num_tokens=sum(tokens.values()),
        block_flops=work.block_flops,
        head_flops=sum(heads[split] * count for split, count in tokens.items()),
    )
    columns = _columns(wanted, tokens, sizes)
    constant_bytes = _constant_bytes(wanted, sizes, _itemsize(teacher))
    about_bytes = sum(column.about_bytes for column in columns) + constant_bytes
    return ConfigPlan(
        architecture=type(outline).__name__,
        dtype=teacher.dtype,
        num_parameters=sum(weight.numel() for weight in outline.parameters()),
        num_blocks=weights.num_blocks,
        machine=machine,
        num_tokens=tokens,
        flops_per_token={split: work.block_flops + head for split, head in heads.items()},
        columns=columns,
        constant_bytes=constant_bytes,
        about_bytes=about_bytes,
        most_bytes=sum(column.most_bytes for column in columns) + constant_bytes,
        write_hours=about_bytes / machine.disk_rate / 3600,
        placements=[task.whole(), task.streamed()],
    )


def _located(recipe: Recipe) -> Teacher:
    section = recipe.teacher
    folder = resolve_folder(section.path, revision=section.revision, config_only=True)
    teacher = Teacher(section, folder, load_config(folder, trust_remote_code=section.trust_remote_code))
    if teacher.quantisation is not None:
        raise ModelError(
            f"the weights of {section.path} are quantised by {teacher.quantisation}, and a config does not say how "
            "many bytes that leaves: plan with the weights, or by the config of the model that they were made of"
        )
    return teacher


def _tokens(recipe: Recipe, num_tokens: int | None) -> dict[str, int]:
    data = recipe.data
    if num_tokens is None and data.train.max_rows is None:
        raise RecipeError(
            "a plan without weights reads no text, and data.train.max_rows does not say how many rows there are: say "
            "--tokens, such as --tokens 1e9"
        )
    eval_rows = sum(source.max_rows or 0 for source in data.eval_sources)
    train_tokens = num_tokens or (data.train.max_rows or 0) * data.sequence_length
    return {"train": train_tokens, "eval": eval_rows * data.sequence_length}


# The targets of each split, and how many columns each of them stands for.
_Wanted = Mapping[str, Mapping[Target, int]]


def _wanted(recipe: Recipe, teacher: Teacher) -> dict[str, dict[Target, int]]:
    """Return the targets of each split; a mapped block stands for all where only pruning decides which they are."""
    blocks, count = recipe.targets.hidden.blocks, 1
    if not isinstance(blocks, list):
        blocks = []
        if recipe.loss.needs_hidden:
            layer_map, is_decided = planned_layer_map(recipe, teacher)
            blocks = sorted(set(layer_map.values()))
            if not is_decided:
                blocks, count = [0], len(layer_map)
    with tempfile.TemporaryDirectory(prefix="coldstill-plan-") as folder:
        nothing_yet = Manifest(Store(open_objects(folder), {}))
        wanted = {
            split: wanted_targets(recipe.targets, blocks=blocks, split=split, manifest=nothing_yet, shards=[])
            for split in SPLITS
        }
    mapped = {target for of_split in wanted.values() for target in of_split.hidden.values()}
    return {
        split: {target: count if target in mapped else 1 for target in of_split.all()}
        for split, of_split in wanted.items()
    }


def _columns(wanted: _Wanted, tokens: Mapping[str, int], sizes: ModelSizes) -> list[StoredColumn]:
    targets = {target: count for of_split in wanted.values() for target, count in of_split.items()}
    columns = []
    for target, count in targets.items():
        num_tokens = sum(tokens[split] for split, of_split in wanted.items() if target in of_split)
        num_shards = -(-num_tokens // laying.SHARD_TOKENS)
        most_bytes = count * target.raw_bytes(sizes, num_tokens=num_tokens, num_shards=num_shards)
        name = target.name_of_several(count) if count > 1 and isinstance(target, BlockOutput) else target.name
        columns.append(StoredColumn(name, num_tokens, most_bytes, round(target.written_share * most_bytes)))
    return columns


def _constant_bytes(wanted: _Wanted, sizes: ModelSizes, itemsize: int) -> int:
    """Return the bytes of the output head, and of each calibration: a basis and its inverse in float32."""
    calibrated: dict[str, int] = {}
    for of_split in wanted.values():
        calibrated |= {target.calibration: of_split[target] for target in _of_teacher(of_split) if target.calibration}
    return sizes.vocab_size * sizes.width * itemsize + sum(calibrated.values()) * 2 * 4 * sizes.width**2


def _work_bytes(recipe: Recipe, teacher: Teacher, wanted: _Wanted, work: TokenWork) -> int:
    """Return what a batch takes inside a block, or the states of a shard while they are encoded, whichever is more."""
    sizes, itemsize = ModelSizes.of(teacher.config), _itemsize(teacher)
    of_batch = recipe.teacher.batch_size * recipe.data.sequence_length * work.num_values * itemsize
    of_token = 0
    for of_split in wanted.values():
        targets = _of_teacher(of_split)
        num_states = sum(of_split[target] * len(target.needs.blocks) for target in targets)
        num_states += any(target.needs.final_state for target in targets)
        encoding = max((target.encoding_bytes(sizes) for target in targets), default=0)
        of_token = max(of_token, num_states * sizes.width * itemsize + encoding)
    return round(max(of_batch, laying.SHARD_TOKENS * of_token))


def _of_teacher(targets: Mapping[Target, int]) -> list[TeacherTarget]:
    return [target for target in targets if isinstance(target, TeacherTarget)]


def _itemsize(teacher: Teacher) -> int:
    return int(getattr(torch, teacher.dtype).itemsize)
