"""What a run left in its folder and in its store, read for a report. Nothing is computed and nothing is drawn here."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldstill.cache.errors import ColdstillError
from coldstill.cache.manifest import Manifest
from coldstill.pipeline.judging.results import read_evaluation
from coldstill.pipeline.outputs.provenance import PROVENANCE_FILE, RECIPE_FILE
from coldstill.pipeline.outputs.run_index import RunRows, find_run_rows, trained_student
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.runtime.errors import RecipeError
from coldstill.pipeline.students.folders import find_student
from coldstill.pipeline.students.pruning_record import read_pruning
from coldstill.pipeline.targets.wanted import wanted_targets

_METRICS_FILE = "train.json"


@dataclass(frozen=True)
class StoreRecord:
    """What a report says of a run's store.

    Attributes:
        path: Its folder or URL.
        teacher: Facts about its teacher.
        num_rows: Of each split.
        num_tokens: Of each split.
        bytes_per_token: Of each column that training reads, over the train rows.
    """

    path: str
    teacher: Mapping[str, Any]
    num_rows: dict[str, int]
    num_tokens: dict[str, int]
    bytes_per_token: dict[str, float]


@dataclass(frozen=True)
class RunRecord:
    """A trained run.

    Attributes:
        folder: The run's folder.
        recipe: What made it; its `output` is the folder, wherever that lies now.
        summary: The `TrainSummary`.
        layer_map: Student block to teacher block; empty where block outputs were not learned from.
        log: What training logged, in order.
        evaluation: The `Evaluation`; None where nobody judged the run since it was trained.
        provenance: Where, when and with what the student was made.
        student: The student's config.
        pruning: What was cut of the teacher; None where nothing says so.
        precompute: What stage one did for this run, a `PrecomputeSummary`; None where nothing says so.
        store: The store; None where it is gone.
        store_problem: Why it is.
    """

    folder: Path
    recipe: Recipe
    summary: dict[str, Any]
    layer_map: dict[int, int]
    log: list[dict[str, float]]
    evaluation: dict[str, Any] | None
    provenance: dict[str, Any]
    student: dict[str, Any]
    pruning: dict[str, Any] | None
    precompute: dict[str, Any] | None
    store: StoreRecord | None
    store_problem: str

    @property
    def kept_blocks(self) -> list[int] | None:
        """The teacher block of each of the student's, or None where it was not cut from the teacher."""
        kept = self.student.get("kept_blocks")
        return None if kept is None else [int(block) for block in kept]

    @property
    def num_student_blocks(self) -> int:
        """How many decoder blocks the student has."""
        return int({**self.student, **self.student.get("text_config", {})}["num_hidden_layers"])

    @property
    def num_teacher_blocks(self) -> int | None:
        """How many decoder blocks the teacher has; None where nothing says so any more."""
        if self.store is not None:
            return int(self.store.teacher["num_blocks"])
        return None if self.pruning is None else int(self.pruning["blocks"]["teacher"])


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, complete or not."""
    return (folder / _METRICS_FILE).is_file() or any(
        (folder / part / RECIPE_FILE).is_file() for part in ("checkpoints", "precompute", "student")
    )


def read_run(folder: Path) -> RunRecord:
    """Read a trained run.

    Raises:
        RecipeError: It is not trained yet, or its files are damaged.
    """
    try:
        metrics = json.loads((folder / _METRICS_FILE).read_text())
        student = json.loads((folder / "student" / "config.json").read_text())
        recipe = load_recipe(folder / "student" / RECIPE_FILE, [f"output={json.dumps(str(folder))}"])
    except FileNotFoundError as error:
        name = Path(str(error.filename)).relative_to(folder)
        raise RecipeError(f"the run in {folder} is not complete: no {name}; run: coldstill train") from None
    except ValueError as error:
        raise RecipeError(f"the run in {folder} is damaged: {error}") from None
    layer_map = {int(own): int(other) for own, other in metrics.get("layer_map", {}).items()}
    try:
        store, problem = _read_store(recipe, find_run_rows(recipe), layer_map), ""
    except ColdstillError as error:
        store, problem = None, str(error)
    return RunRecord(
        folder=folder,
        recipe=recipe,
        summary=metrics["summary"],
        layer_map=layer_map,
        log=metrics["log"],
        evaluation=read_evaluation(recipe),
        provenance=_read(trained_student(recipe)),
        student=student,
        pruning=_read_pruning(recipe),
        precompute=_read(folder / "precompute").get("precompute"),
        store=store,
        store_problem=problem,
    )


def _read_store(recipe: Recipe, run: RunRows, layer_map: Mapping[int, int]) -> StoreRecord:
    manifest, shards = Manifest(run.store), run.selections["train"].shard_names
    blocks = list(layer_map.values())
    wanted = wanted_targets(recipe.targets, blocks=blocks, split="train", manifest=manifest, shards=shards)
    measured = {name: manifest.bytes_per_token(name, shards=shards) for name in wanted.names()}
    return StoreRecord(
        path=run.store.path,
        teacher=run.store.teacher,
        num_rows={split: len(selection) for split, selection in run.selections.items()},
        num_tokens={split: selection.num_tokens for split, selection in run.selections.items()},
        bytes_per_token={name: size for name, size in measured.items() if size is not None},
    )


def _read_pruning(recipe: Recipe) -> dict[str, Any] | None:
    try:
        return read_pruning(find_student(recipe))
    except ColdstillError:
        return None


def _read(folder: Path) -> dict[str, Any]:
    """Read the record of an output; empty where there is none."""
    try:
        found: dict[str, Any] = json.loads((folder / PROVENANCE_FILE).read_text())
    except FileNotFoundError:
        return {}
    return found
