"""What `precompute` would do: what is complete, what is missing, and what that costs. Nothing is written or loaded."""

from dataclasses import dataclass

from coldstill.cache.manifest import Manifest
from coldstill.cache.objects import open_objects
from coldstill.cache.store import ROOT_METADATA, Store, open_store, store_path
from coldstill.pipeline.models.sizes import ModelSizes
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.stage_one.preflight import planned_layer_map
from coldstill.pipeline.stage_one.requests import (
    RecipeRows,
    Request,
    RowRegistry,
    blocks_to_store,
    demand_of,
    gather,
    missing_jobs,
    needed_targets,
    require_stored,
)
from coldstill.pipeline.students.folders import find_student, has_student, students_folder
from coldstill.pipeline.students.preparing import calibration_rows, student_name
from coldstill.pipeline.targets.target import Target
from coldstill.pipeline.targets.wanted import block_output


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
        is_undecided: Whether it stands for several columns, which are known when the student is made.
    """

    name: str
    num_shards: int
    num_complete: int
    missing_tokens: int
    missing_bytes: int
    is_measured: bool
    is_undecided: bool = False


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
        undecided_blocks: How many mapped blocks are known only when a student's blocks are chosen.
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
    require_stored(recipes)
    teacher, gathered = gather(recipes, trains_here=trains_here, is_dry=True)
    students = [_Student.of(item, teacher) for item in gathered]
    requests = [Request(student.of_recipe, student.blocks or []) for student in students]
    store = _store_of(recipes[0], teacher)
    manifest = Manifest(store)
    registry = RowRegistry(store, manifest, is_dry=True)
    sizes = ModelSizes.of(teacher.config)
    demands = [
        demand_of(request, registry.register(request, vocab_size=sizes.vocab_size), manifest) for request in requests
    ]
    needed = needed_targets(demands)
    tokens = {shard: registry.num_tokens(shard) for shard in needed}
    columns = _costs(manifest, needed, tokens, sizes)
    undecided = max(student.num_undecided for student in students)
    if undecided:
        columns.append(_undecided_cost(recipes[0], needed, tokens, sizes, undecided))
        computed_tokens = sum(tokens[shard] for shard in needed)
    else:
        computed_tokens = sum(job.num_tokens for job in missing_jobs(manifest, registry.num_tokens, demands))
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

    of_recipe: RecipeRows
    name: str
    is_there: bool
    blocks: list[int] | None
    num_undecided: int = 0

    @classmethod
    def of(cls, item: RecipeRows, teacher: Teacher) -> "_Student":
        recipe = item.recipe
        section = recipe.student.made_from_teacher
        if section is None:
            folder = find_student(recipe)
            return cls(item, folder.name, True, blocks_to_store(recipe, teacher, folder))
        name = student_name(section, teacher, calibration_rows(section, item.rows["train"]))
        folder = students_folder(recipe) / name
        if has_student(recipe, folder):
            return cls(item, name, True, blocks_to_store(recipe, teacher, folder))
        wanted = recipe.targets.hidden.blocks
        if wanted != "mapped" or not recipe.loss.needs_hidden:
            return cls(item, name, False, wanted if isinstance(wanted, list) else [])
        layer_map, is_decided = planned_layer_map(recipe, teacher)
        if not is_decided:
            return cls(item, name, False, None, len(layer_map))
        return cls(item, name, False, list(layer_map.values()))


def _store_of(recipe: Recipe, teacher: Teacher) -> Store:
    """Open the teacher's store, or stand in for the one that would be created."""
    path = store_path(recipe.cache, teacher.fingerprint)
    objects = open_objects(path)
    return open_store(path) if objects.exists(ROOT_METADATA) else Store(objects, teacher.describe())


def _costs(
    manifest: Manifest, needed: dict[str, dict[Target, None]], tokens: dict[str, int], sizes: ModelSizes
) -> list[ColumnCost]:
    targets = dict.fromkeys(target for of_shard in needed.values() for target in of_shard)
    costs = []
    for target in targets:
        shards = [shard for shard, of_shard in needed.items() if target in of_shard]
        missing = [shard for shard in shards if (shard, target.name) not in manifest]
        per_token = manifest.bytes_per_token(target.name)
        num_tokens = sum(tokens[shard] for shard in missing)
        num_bytes = (
            num_tokens * per_token
            if per_token is not None
            else target.raw_bytes(sizes, num_tokens=num_tokens, num_shards=len(missing))
        )
        costs.append(
            ColumnCost(
                name=target.name,
                num_shards=len(shards),
                num_complete=len(shards) - len(missing),
                missing_tokens=num_tokens,
                missing_bytes=round(num_bytes),
                is_measured=per_token is not None,
            )
        )
    return costs


def _undecided_cost(
    recipe: Recipe, needed: dict[str, dict[Target, None]], tokens: dict[str, int], sizes: ModelSizes, count: int
) -> ColumnCost:
    """Return the cost of blocks that are known only after pruning: in every shard, as nobody knows which are there."""
    any_block = block_output(recipe.targets.hidden, 0)
    num_tokens = sum(tokens[shard] for shard in needed)
    return ColumnCost(
        name=any_block.name_of_several(count),
        num_shards=len(needed),
        num_complete=0,
        missing_tokens=count * num_tokens,
        missing_bytes=count * any_block.raw_bytes(sizes, num_tokens=num_tokens, num_shards=len(needed)),
        is_measured=False,
        is_undecided=True,
    )
