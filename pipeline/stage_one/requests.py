"""What recipes ask of one teacher's store: which rows, which columns of them, and what of it is missing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from coldstill.cache.identity import ROW_ID_BYTES
from coldstill.cache.laying import lay_rows, places_of_rows
from coldstill.cache.manifest import Manifest
from coldstill.cache.row_lines import id_array
from coldstill.cache.rows import publish_rows, read_lines
from coldstill.cache.selections import Selection, make_selection, write_selection
from coldstill.cache.store import Store
from coldstill.cache.tokens import TOKENS, write_tokens
from coldstill.pipeline.models import check_length, load_config
from coldstill.pipeline.models.pairing import check_layer_map, layer_map_of
from coldstill.pipeline.models.sizes import ModelSizes
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.outputs.run_index import DOMAINS
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.rows.building import build_rows, tokenizer_digest
from coldstill.pipeline.rows.kept_rows import Rows, RowsPlace
from coldstill.pipeline.runtime.errors import DataError, RecipeError
from coldstill.pipeline.stage_one.preflight import check_before_teacher
from coldstill.pipeline.stage_one.shard_jobs import ShardJob
from coldstill.pipeline.stage_two.arguments import check_row_count
from coldstill.pipeline.students.preparing import PreparedStudent, check_student
from coldstill.pipeline.targets.logits_kinds import logits_targets
from coldstill.pipeline.targets.target import Target, TeacherTarget
from coldstill.pipeline.targets.wanted import WantedTargets, wanted_targets

SPLITS = ("eval", "train")


@dataclass(frozen=True)
class RecipeRows:
    """A recipe and its rows, by split.

    Attributes:
        recipe: The recipe.
        rows: Its rows.
        tokenizer: Digest of the tokenizer that made them.
    """

    recipe: Recipe
    rows: Mapping[str, Rows]
    tokenizer: str

    def provenance(self, split: str) -> dict[str, object]:
        """Say where the rows of a split came from, and where they are of several sources, how many are of each."""
        rows = self.rows[split]
        domains = [{"label": label, "num_rows": num_rows} for label, num_rows in rows.domains.items()]
        return {
            "tokenizer": self.tokenizer,
            "source": self.recipe.data.source_identity(split),
            "num_documents": rows.num_documents,
            "num_shared": rows.num_shared,
            **({DOMAINS: domains} if domains else {}),
        }


@dataclass(frozen=True)
class Request:
    """What one recipe asks of the teacher's store.

    Attributes:
        of: The recipe and its rows.
        blocks: The teacher blocks whose outputs it needs.
        student: Its student; None where it need not exist yet.
    """

    of: RecipeRows
    blocks: Sequence[int]
    student: PreparedStudent | None = None


def gather(
    recipes: Sequence[Recipe], *, trains_here: bool = False, is_dry: bool = False, show_progress: bool = False
) -> tuple[Teacher, list[RecipeRows]]:
    """Find the teacher that all recipes name, and the rows of each, which are made where they are not kept yet.

    Args:
        recipes: One or more.
        trains_here: Whether their students are trained on this machine too.
        is_dry: Whether to keep nothing.
        show_progress: Whether to show progress bars, where making rows takes a while.

    Raises:
        ColdstillError: Something in a recipe cannot be carried out.
    """
    teacher = locate_teacher(recipes, trains_here=trains_here)
    return teacher, find_rows(recipes, teacher, is_dry=is_dry, show_progress=show_progress)


def require_stored(recipes: Sequence[Recipe]) -> None:
    """Refuse recipes of which stage one has nothing to store.

    Raises:
        RecipeError: One keeps its teacher beside the student.
    """
    for recipe in recipes:
        if recipe.targets.is_live:
            raise RecipeError(
                f"targets.source of {recipe.output} is live, so nothing is stored of its teacher: run coldstill train, "
                "or set targets.source=stored"
            )


def locate_teacher(recipes: Sequence[Recipe], *, trains_here: bool = False) -> Teacher:
    """Find the teacher that all recipes name, and refuse, before any work, what cannot be carried out of them.

    Args:
        recipes: One or more.
        trains_here: Whether their students are trained on this machine too.

    Raises:
        RecipeError: The recipes name different teachers or caches, or one asks for what this teacher does not have.
        ModelError: There is no such teacher, or a student that does not fit it.
    """
    first = recipes[0]
    for recipe in recipes[1:]:
        for section in ("teacher", "cache", "local_copy"):
            if getattr(recipe, section) != getattr(first, section):
                raise RecipeError(
                    f"the recipes of {first.output} and {recipe.output} differ in `{section}`; recipes that are "
                    "precomputed together share teacher and cache: precompute them one after another"
                )
    teacher = Teacher.locate(first.teacher)
    for recipe in recipes:
        check_targets(recipe, teacher)
        check_student(recipe, teacher)
        check_before_teacher(recipe, teacher, trains_here=trains_here)
    return teacher


def recipe_rows(
    recipe: Recipe, teacher: Teacher, *, is_dry: bool = False, show_progress: bool = False
) -> dict[str, Rows]:
    """Return the rows of a recipe by split.

    Raises:
        DataError: A text source cannot give them, or the tokenizer does not fit the teacher.
    """
    train, held_out = build_rows(
        recipe.data,
        teacher.tokenizer,
        keep_in=RowsPlace.of(recipe),
        is_dry=is_dry,
        show_progress=show_progress,
    )
    vocab_size = ModelSizes.of(teacher.config).vocab_size
    largest = max(train.counts.largest_id, held_out.counts.largest_id)
    if largest >= vocab_size:
        raise DataError(
            f"the tokenizer in {teacher.folder} gives token id {largest}; the teacher's vocabulary has "
            f"{vocab_size} entries"
        )
    return {"train": train, "eval": held_out}


def find_rows(
    recipes: Sequence[Recipe], teacher: Teacher, *, is_dry: bool = False, show_progress: bool = False
) -> list[RecipeRows]:
    """Find the rows of each recipe by split, once for recipes with the same data; see `gather`.

    Raises:
        DataError: A text source cannot give them, or the tokenizer does not fit the teacher.
    """
    tokenizer = tokenizer_digest(teacher.tokenizer)
    gathered: list[RecipeRows] = []
    for recipe in recipes:
        rows = next((other.rows for other in gathered if other.recipe.data == recipe.data), None)
        if rows is None:
            rows = recipe_rows(recipe, teacher, is_dry=is_dry, show_progress=show_progress)
        check_row_count(recipe, len(rows["train"]))
        gathered.append(RecipeRows(recipe, rows, tokenizer))
    return gathered


def check_targets(recipe: Recipe, teacher: Teacher) -> None:
    """Refuse, before any work, what this teacher cannot do, by its config.

    Raises:
        RecipeError: The recipe asks for blocks or tokens that it does not have.
        ModelError: Rows are longer than what it reads.
    """
    logits_targets(recipe.targets.logits).check(ModelSizes.of(teacher.config).vocab_size)
    check_length(teacher.config, recipe.data.sequence_length, who="teacher")
    for key, blocks in recipe.targets.hidden.named_blocks.items():
        beyond = [block for block in blocks if block >= teacher.num_blocks]
        if beyond:
            raise RecipeError(
                f"targets.hidden.{key} names block {beyond[0]}; the teacher has blocks 0 to {teacher.num_blocks - 1}"
            )


def blocks_to_store(recipe: Recipe, teacher: Teacher, student: Path) -> list[int]:
    """Return the teacher blocks whose outputs a recipe keeps for the student in a folder.

    Those that it names; or those that are mapped, where the loss learns from them.
    """
    section = recipe.targets.hidden.blocks
    if section == "none" or not recipe.loss.needs_hidden:
        return list(section) if isinstance(section, list) else []
    config = load_config(student, trust_remote_code=recipe.student.trust_remote_code)
    layer_map = layer_map_of(recipe.mapping, config, num_teacher_blocks=teacher.num_blocks)
    if isinstance(section, list):
        # Of a student that was pruned just now, which blocks these are is known at last.
        check_layer_map(recipe, layer_map)
        return section
    return list(layer_map.values())


class RowRegistry:
    """Lays the rows of requests into shards, and selects them.

    Args:
        store: The store.
        manifest: Its manifest.
        is_dry: Whether to write nothing, and only to find out what would be.
    """

    def __init__(self, store: Store, manifest: Manifest, *, is_dry: bool = False) -> None:
        self._known = list(read_lines(store).values())
        self._store = store
        self._manifest = manifest
        self._is_dry = is_dry
        self._shards = set(manifest.shards(TOKENS))
        # Of shards that nothing was written of.
        self._laid_tokens: dict[str, int] = {}

    def register(self, request: Request, *, vocab_size: int) -> dict[str, Selection]:
        """Make the rows of a request known, their tokens first, and return the selection of each split."""
        return {split: self._register_split(request, split, vocab_size) for split in SPLITS}

    def num_tokens(self, shard: str) -> int:
        """Return the tokens of a shard's rows."""
        if (shard, TOKENS) in self._manifest:
            return self._manifest.record(shard, TOKENS).num_tokens
        return self._laid_tokens[shard]

    def _register_split(self, request: Request, split: str, vocab_size: int) -> Selection:
        rows = request.of.rows[split]
        laid = lay_rows(self._known, self._shards, rows)
        if self._is_dry:
            self._laid_tokens |= laid.rows.num_tokens()
        else:
            write_tokens(self._store, self._manifest, laid, rows.file.pieces, vocab_size=vocab_size)
            publish_rows(self._store, laid.rows)
        self._known.append(laid.rows)
        self._shards.update(laid.rows.names)
        found = places_of_rows(self._store, self._known, self._shards, rows)
        if self._is_dry:
            return make_selection(found, rows.spans(), request.of.provenance(split), rows.labels())
        return write_selection(self._store, found, rows.spans(), request.of.provenance(split), rows.labels())


@dataclass(frozen=True)
class Demand:
    """What one recipe needs in its shards.

    Attributes:
        request: What it asks for.
        selections: Its rows, by split.
        targets: What it wants of these, by split.
    """

    request: Request
    selections: Mapping[str, Selection]
    targets: Mapping[str, WantedTargets]


def demand_of(request: Request, selections: Mapping[str, Selection], manifest: Manifest) -> Demand:
    """Say which targets a request wants of its rows."""
    targets = {
        split: wanted_targets(
            request.of.recipe.targets,
            blocks=request.blocks,
            split=split,
            manifest=manifest,
            shards=selection.shard_names,
        )
        for split, selection in selections.items()
    }
    return Demand(request, selections, targets)


def needed_targets(demands: Sequence[Demand]) -> dict[str, dict[Target, None]]:
    """Map each shard to the targets that are asked of it, in the order in which they are written."""
    needed: dict[str, dict[Target, None]] = {}
    for demand in demands:
        for split, selection in demand.selections.items():
            for shard in selection.shard_names:
                needed.setdefault(shard, {}).update(dict.fromkeys(demand.targets[split].all()))
    return needed


def missing_jobs(manifest: Manifest, num_tokens: Callable[[str], int], demands: Sequence[Demand]) -> list[ShardJob]:
    """List the shards that lack a column, each with all that it lacks: one teacher pass serves every recipe.

    Args:
        manifest: What is complete.
        num_tokens: Gives the tokens of a shard.
        demands: What the recipes need.
    """
    missing = {
        shard: tuple(
            target for target in targets if isinstance(target, TeacherTarget) and (shard, target.name) not in manifest
        )
        for shard, targets in needed_targets(demands).items()
    }
    return [ShardJob(shard, num_tokens(shard), targets) for shard, targets in missing.items() if targets]


def row_names(demands: Sequence[Demand], row_ids: Sequence[bytes]) -> dict[bytes, str]:
    """Name some rows as errors do, by split and number: all rows of the recipes are gone through for that."""
    chosen, names = pa.array(row_ids, pa.binary(ROW_ID_BYTES)), {}
    for demand in demands:
        for split, rows in demand.request.of.rows.items():
            start = 0
            for places in rows.slices():
                ids = id_array(places["row"])
                for index in pc.indices_nonzero(pc.is_in(ids, value_set=chosen)).to_pylist():
                    names[ids[index].as_py()] = f"{split} row {start + index}"
                start += len(ids)
    return names
