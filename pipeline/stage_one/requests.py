"""What recipes ask of one teacher's store: which rows, which columns of them, and what of it is missing."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from coldstill.cache.errors import DataError, RecipeError
from coldstill.cache.identity import row_id
from coldstill.cache.manifest import Manifest
from coldstill.cache.rows import find_rows, lay_rows, publish_rows, read_rows, shard_rows, sorted_rows
from coldstill.cache.selections import Selection, make_selection, to_selection, write_selection
from coldstill.cache.store import Store
from coldstill.cache.tokens import TOKENS, write_tokens
from coldstill.pipeline.models import check_length, load_config, text_config
from coldstill.pipeline.models.pairing import check_layer_map, layer_map_of
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.recipe.sections import DataConfig, Recipe
from coldstill.pipeline.rows.building import Rows, build_rows
from coldstill.pipeline.stage_one.preflight import check_before_teacher
from coldstill.pipeline.stage_one.shard_jobs import ShardJob
from coldstill.pipeline.stage_two.arguments import check_row_count
from coldstill.pipeline.students.preparing import check_student
from coldstill.pipeline.targets.columns import TargetColumns, columns_of

SPLITS = ("eval", "train")


@dataclass(frozen=True)
class Request:
    """One recipe's rows and blocks.

    Attributes:
        recipe: The recipe.
        rows: Its rows, by split.
        tokenizer: Digest of the tokenizer that made them.
        blocks: The teacher blocks whose outputs it needs.
    """

    recipe: Recipe
    rows: Mapping[str, Rows]
    tokenizer: str
    blocks: Sequence[int]

    def provenance(self, split: str) -> dict[str, object]:
        """Say where the rows of a split came from."""
        return {
            "tokenizer": self.tokenizer,
            "source": getattr(self.recipe.data, split).identity(),
            "num_documents": self.rows[split].num_documents,
            "num_shared": self.rows[split].num_shared,
        }


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
        _check_recipe(recipe, teacher)
        check_student(recipe, teacher)
        check_before_teacher(recipe, teacher, trains_here=trains_here)
    return teacher


def build_requested_rows(recipes: Sequence[Recipe], teacher: Teacher) -> list[dict[str, Rows]]:
    """Make the rows of each recipe by split, once for recipes with the same data.

    Raises:
        DataError: A text source cannot give them, or the tokenizer does not fit the teacher.
    """
    built: list[tuple[DataConfig, dict[str, Rows]]] = []
    for recipe in recipes:
        if all(recipe.data != data for data, _ in built):
            train_rows, eval_rows = build_rows(recipe.data, teacher.tokenizer)
            _check_vocabulary([*train_rows.tokens, *eval_rows.tokens], teacher)
            built.append((recipe.data, {"train": train_rows, "eval": eval_rows}))
        rows = next(rows for data, rows in built if recipe.data == data)
        check_row_count(recipe, len(rows["train"].tokens))
    return [next(rows for data, rows in built if data == recipe.data) for recipe in recipes]


def _check_recipe(recipe: Recipe, teacher: Teacher) -> None:
    """Refuse, before any work, what this teacher cannot do."""
    config = text_config(teacher.config)
    logits = recipe.targets.logits
    if logits.kind in ("topk", "topk_sampled") and logits.k > config.vocab_size - (logits.kind == "topk_sampled"):
        tail = ": no tail is left to draw from" if logits.k == config.vocab_size else ""
        raise RecipeError(
            f"targets.logits.k is {logits.k}, but the teacher's vocabulary has {config.vocab_size} entries{tail}"
        )
    check_length(teacher.config, recipe.data.sequence_length, who="teacher")
    blocks = recipe.targets.hidden.blocks
    for block in blocks if isinstance(blocks, list) else []:
        if block >= teacher.num_blocks:
            raise RecipeError(
                f"targets.hidden.blocks names block {block}; the teacher has blocks 0 to {teacher.num_blocks - 1}"
            )


def _check_vocabulary(tokens: Iterable[np.ndarray], teacher: Teacher) -> None:
    vocab_size = int(text_config(teacher.config).vocab_size)
    largest = max(int(ids.max()) for ids in tokens)
    if largest >= vocab_size:
        raise DataError(
            f"the tokenizer in {teacher.folder} gives token id {largest}; the teacher's vocabulary has "
            f"{vocab_size} entries"
        )


def blocks_to_store(recipe: Recipe, teacher: Teacher, student: Path) -> list[int]:
    """Give the teacher blocks whose outputs a recipe needs for the student in a folder."""
    section = recipe.targets.hidden.blocks
    if section == "none" or (isinstance(section, list) and not recipe.loss.needs_hidden):
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
        self.known = read_rows(store)
        self._store = store
        self._manifest = manifest
        self._is_dry = is_dry
        self._shards = set(manifest.shards(TOKENS))

    def register(self, request: Request, *, vocab_size: int) -> dict[str, Selection]:
        """Make the rows of a request known, their tokens first, and give the selection of each split."""
        return {split: self._register_split(request, split, vocab_size) for split in SPLITS}

    def _register_split(self, request: Request, split: str, vocab_size: int) -> Selection:
        rows = request.rows[split]
        tokens = {row_id(ids): ids for ids in rows.tokens}
        row_ids = [row_id(ids) for ids in rows.tokens]
        laid = lay_rows(self.known, self._shards, row_ids, [len(ids) for ids in rows.tokens])
        if not self._is_dry:
            write_tokens(self._store, self._manifest, laid, tokens, vocab_size=vocab_size)
            publish_rows(self._store, laid)
        self.known = sorted_rows([self.known, laid])
        self._shards.update(laid["shard"].cast(pa.string()).to_pylist())
        found = find_rows(self._store, self.known, self._shards, row_ids)
        spans, labels = [row.spans for row in rows.rows], [row.labels for row in rows.rows]
        provenance = request.provenance(split)
        if self._is_dry:
            return to_selection(*make_selection(found, spans, provenance, labels))
        return write_selection(self._store, found, spans, provenance, labels)


@dataclass(frozen=True)
class Demand:
    """What one recipe needs in its shards: for each split the selection and the columns."""

    selections: Mapping[str, Selection]
    targets: Mapping[str, TargetColumns]


def demand_of(request: Request, selections: Mapping[str, Selection], manifest: Manifest) -> Demand:
    """Say which columns a request needs of its rows."""
    targets = {
        split: columns_of(
            request.recipe.targets,
            blocks=request.blocks,
            split=split,
            manifest=manifest,
            shards=selection.shard_names,
        )
        for split, selection in selections.items()
    }
    return Demand(selections, targets)


def needed_columns(demands: Sequence[Demand]) -> dict[str, dict[str, None]]:
    """Map each shard to the columns that are asked of it, in the order in which they are written."""
    needed: dict[str, dict[str, None]] = {}
    for demand in demands:
        for split, selection in demand.selections.items():
            for shard in selection.shard_names:
                needed.setdefault(shard, {}).update(dict.fromkeys(demand.targets[split].names()))
    return needed


def missing_jobs(manifest: Manifest, known: pa.Table, demands: Sequence[Demand]) -> list[ShardJob]:
    """List the shards that lack a column, each with all that it lacks: one teacher pass serves every recipe."""
    missing = {
        shard: tuple(name for name in names if (shard, name) not in manifest)
        for shard, names in needed_columns(demands).items()
    }
    missing = {shard: names for shard, names in missing.items() if names}
    tables = shard_rows(known, list(missing))
    return [ShardJob(shard, tables[shard], names) for shard, names in missing.items()]


def row_names(requests: Sequence[Request]) -> dict[bytes, str]:
    """Name rows as errors do: by split and number."""
    return {
        row_id(np.asarray(ids)): f"{split} row {index}"
        for request in requests
        for split, rows in request.rows.items()
        for index, ids in enumerate(rows.tokens)
    }
