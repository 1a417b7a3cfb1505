"""What `precompute` would do: what is complete, what is missing, and what that costs. Nothing is written or loaded."""

from dataclasses import dataclass

import numpy as np
from coldstill.cache.manifest import Manifest
from coldstill.cache.objects import open_objects
from coldstill.cache.rows import split_shards
from coldstill.cache.store import ROOT_METADATA, Store, open_store, store_path
from coldstill.pipeline.models import text_config
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.rows.building import Rows, tokenizer_digest
from coldstill.pipeline.stage_one.byte_estimates import measured_bytes, raw_bytes
from coldstill.pipeline.stage_one.preflight import planned_layer_map
from coldstill.pipeline.stage_one.requests import (
    Request,
    RowRegistry,
    blocks_to_store,
    build_requested_rows,
    demand_of,
    locate_teacher,
    missing_jobs,
    needed_columns,
)
from coldstill.pipeline.students.folders import find_student, has_student, students_folder
from coldstill.pipeline.students.preparing import calibration_rows, student_name
from coldstill.pipeline.targets.columns import hidden_form, hidden_name


@dataclass(frozen=True)
class ColumnCost:
    """A column that recipes ask for.

    Attributes:
        name: The column's name.
        num_shards: Shards that need it.
        num_complete: Shards that have it.
        missing_tokens: Tokens of the others.
        missing_bytes: How many bytes these will take.
        is_measured: Whether that is by what the column takes elsewhere in the store; it is at most so many otherwise.
    """

    name: str
    num_shards: int
    num_complete: int
    missing_tokens: int
    missing_bytes: int
    is_measured: bool


@dataclass(frozen=True)
class DryRun:
    """What a run of stage one would do.

    Attributes:
        store: The store's folder or URL.
        columns: Each column that is asked for.
        num_shards: Shards that hold the rows.
        num_tokens: Tokens of these shards.
        computed_tokens: Tokens that the teacher would read.
        missing_bytes: About how many bytes would be written.
        students_to_prune: Students that would be cut from the teacher.
        undecided_blocks: How many mapped blocks are known only when a student was pruned by importance.
    """

    store: str
    columns: list[ColumnCost]
    num_shards: int
    num_tokens: int
    computed_tokens: int
    missing_bytes: int
    students_to_prune: int
    undecided_blocks: int


def dry_run(*recipes: Recipe, trains_here: bool = False) -> DryRun:
    """Find out what `precompute` of these recipes would do.

    Args:
        recipes: One or more.
        trains_here: Whether their students are trained on this machine too, so that what it lacks for that is a fault.

    Raises:
        ColdstillError: Something in a recipe cannot be carried out.
    """
    teacher = locate_teacher(recipes, trains_here=trains_here)
    built = build_requested_rows(recipes, teacher)
    tokenizer = tokenizer_digest(teacher.tokenizer)
    students = [_Student.of(recipe, teacher, rows["train"]) for recipe, rows in zip(recipes, built, strict=True)]
    requests = [
        Request(recipe, rows, tokenizer, student.blocks or [])
        for recipe, rows, student in zip(recipes, built, students, strict=True)
    ]
    store = _store_of(recipes[0], teacher)
    manifest = Manifest(store)
    registry = RowRegistry(store, manifest, is_dry=True)
    vocab_size = int(text_config(teacher.config).vocab_size)
    demands = [demand_of(request, registry.register(request, vocab_size=vocab_size), manifest) for request in requests]
    needed = needed_columns(demands)
    tokens = {shard: int(np.sum(rows["length"].to_numpy())) for shard, rows in split_shards(registry.known).items()}
    columns = _costs(manifest, needed, tokens, teacher)
    undecided = max(student.num_undecided for student in students)
    if undecided:
        columns.append(_undecided_cost(recipes[0], needed, tokens, teacher, undecided))
        computed_tokens = sum(tokens[shard] for shard in needed)
    else:
        computed_tokens = sum(job.num_tokens for job in missing_jobs(manifest, registry.known, demands))
    return DryRun(
        store=store.path,
        columns=columns,
        num_shards=len(needed),
        num_tokens=sum(tokens[shard] for shard in needed),
        computed_tokens=computed_tokens,
        missing_bytes=sum(column.missing_bytes for column in columns),
        students_to_prune=len({student.name for student in students if not student.is_there}),
        undecided_blocks=undecided,
    )


@dataclass(frozen=True)
class _Student:
    """A recipe's student, which need not exist yet."""

    name: str
    is_there: bool
    blocks: list[int] | None
    num_undecided: int

    @classmethod
    def of(cls, recipe: Recipe, teacher: Teacher, train_rows: Rows) -> "_Student":
        section = recipe.student.made_from_teacher
        if section is None:
            folder = find_student(recipe)
            return cls(folder.name, True, blocks_to_store(recipe, teacher, folder), 0)
        name = student_name(section, teacher, calibration_rows(section, train_rows))
        folder = students_folder(recipe) / name
        if has_student(recipe, folder):
            return cls(name, True, blocks_to_store(recipe, teacher, folder), 0)
        wanted = recipe.targets.hidden.blocks
        if wanted != "mapped":
            return cls(name, False, wanted if isinstance(wanted, list) else [], 0)
        layer_map, is_decided = planned_layer_map(recipe, teacher)
        if not is_decided:
            return cls(name, False, None, len(layer_map))
        return cls(name, False, list(layer_map.values()), 0)


def _store_of(recipe: Recipe, teacher: Teacher) -> Store:
    """Open the teacher's store, or stand in for the one that would be created."""
    path = store_path(recipe.cache, teacher.fingerprint)
    objects = open_objects(path)
    return open_store(path) if objects.exists(ROOT_METADATA) else Store(objects, teacher.describe())


def _costs(
    manifest: Manifest, needed: dict[str, dict[str, None]], tokens: dict[str, int], teacher: Teacher
) -> list[ColumnCost]:
    columns = dict.fromkeys(name for names in needed.values() for name in names)
    costs = []
    for name in columns:
        shards = [shard for shard, names in needed.items() if name in names]
        missing = [shard for shard in shards if (shard, name) not in manifest]
        per_token = measured_bytes(manifest, name)
        num_tokens = sum(tokens[shard] for shard in missing)
        num_bytes = (
            num_tokens * per_token
            if per_token is not None
            else raw_bytes(name, num_tokens=num_tokens, num_shards=len(missing), teacher=teacher)
        )
        num_complete = len(shards) - len(missing)
        costs.append(
            ColumnCost(name, len(shards), num_complete, num_tokens, round(num_bytes), is_measured=per_token is not None)
        )
    return costs


def _undecided_cost(
    recipe: Recipe, needed: dict[str, dict[str, None]], tokens: dict[str, int], teacher: Teacher, count: int
) -> ColumnCost:
    """Give the cost of blocks that are known only after pruning: in every shard, as nobody knows which are there."""
    form = hidden_form(recipe.targets.hidden)
    num_tokens = sum(tokens[shard] for shard in needed)
    name = hidden_name(0, form)
    num_bytes = count * raw_bytes(name, num_tokens=num_tokens, num_shards=len(needed), teacher=teacher)
    return ColumnCost(
        f"hidden/({count} blocks)/{form}", len(needed), 0, count * num_tokens, num_bytes, is_measured=False
    )
