"""From a recipe to the store, rows and student that were made for it: what stage one publishes and stage two finds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.errors import RecipeError, StoreNotFoundError
from cache.index import read_entry, write_entry
from cache.rows import Selection, read_selection
from cache.store import Store, open_store, store_path
from pipeline.config import Recipe
from pipeline.models import resolve_folder

SPLITS = ("train", "eval")


@dataclass(frozen=True)
class RunRows:
    """The store of a recipe's teacher, and the recipe's rows in it, by split."""

    store: Store
    selections: dict[str, Selection]


def publish_run_rows(recipe: Recipe, run: RunRows) -> None:
    """Let the recipe's teacher and data sections lead to these rows."""
    selections = {split: selection.name for split, selection in run.selections.items()}
    write_entry(recipe.cache, "rows", _rows_key(recipe), {"store": run.store.name, "selections": selections})


def find_run_rows(recipe: Recipe) -> RunRows:
    """Find the rows of a recipe, reading nothing but the store.

    Raises:
        StoreNotFoundError: `precompute` never ran for these teacher and data sections.
    """
    entry = read_entry(recipe.cache, "rows", _rows_key(recipe))
    store = open_store(store_path(recipe.cache, entry["store"]))
    return RunRows(store, {split: read_selection(store, name) for split, name in entry["selections"].items()})


def publish_student(recipe: Recipe, folder: Path) -> None:
    """Let the recipe's teacher, data and student sections lead to a pruned student."""
    write_entry(recipe.cache, "student", _student_key(recipe), {"folder": folder.name})


def find_student(recipe: Recipe) -> Path:
    """Find the folder of a recipe's student: the path that it names, or the student pruned for it.

    Raises:
        ModelError: The path leads to no model.
        StoreNotFoundError: The student was not pruned yet, or its folder is gone.
    """
    if recipe.student.path is not None:
        return resolve_folder(recipe.student.path, revision=recipe.student.revision)
    folder = students_folder(recipe) / read_entry(recipe.cache, "student", _student_key(recipe))["folder"]
    if not (folder / "config.json").is_file():
        raise StoreNotFoundError(f"the pruned student in {folder} is gone; run: coldstill prune")
    return folder


def trained_student(recipe: Recipe) -> Path:
    """Give the folder that the trained student is exported to."""
    return Path(recipe.output) / "student"


def students_folder(recipe: Recipe) -> Path:
    """Give the folder that pruned students are kept in, beside the stores.

    Raises:
        RecipeError: The cache is a URL: a student is a folder that transformers reads.
    """
    if "://" in recipe.cache:
        raise RecipeError(f"student.prune needs a cache that is a local folder, got {recipe.cache}; use student.path")
    return Path(recipe.cache) / "students"


def _rows_key(recipe: Recipe) -> dict[str, Any]:
    teacher = recipe.teacher.model_dump(include={"path", "revision", "dtype"})
    return {"teacher": teacher, "data": recipe.data.model_dump()}


def _student_key(recipe: Recipe) -> dict[str, Any]:
    return {**_rows_key(recipe), "student": recipe.student.model_dump()}
