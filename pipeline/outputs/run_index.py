"""From a recipe to the store, rows and student that were made for it: what stage one publishes and stage two finds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldstill.cache.index import read_entry, write_entry
from coldstill.cache.selections import Selection, read_selection
from coldstill.cache.store import Store, open_store, store_path
from coldstill.pipeline.recipe.sections import Recipe

STUDENT = "student"
# Pruned students are kept beside the stores, each in a folder of this one; the index leads to them by the kind.
PRUNED_STUDENTS = "students"
# Rows that were made of a data section, each in a folder of this one.
KEPT_ROWS = "rows"
KEPT_FOLDERS = {STUDENT: PRUNED_STUDENTS, "data": KEPT_ROWS}
# In the provenance of a selection whose rows are of several sources: the label of each, and how many rows, in order.
DOMAINS = "domains"


@dataclass(frozen=True)
class RunRows:
    """The store of a recipe's teacher, and the recipe's rows in it, by split."""

    store: Store
    selections: dict[str, Selection]

    def domains(self, split: str) -> dict[str, range]:
        """Return which rows of a split are of which source, by its label; nothing where there is only one source."""
        found, first = dict[str, range](), 0
        for domain in self.selections[split].provenance.get(DOMAINS, []):
            found[domain["label"]] = range(first, first + domain["num_rows"])
            first += domain["num_rows"]
        return found


def publish_run_rows(recipe: Recipe, run: RunRows) -> None:
    """Let the recipe's teacher and data sections lead to these rows."""
    selections = {split: selection.name for split, selection in run.selections.items()}
    write_entry(recipe.cache, "rows", rows_key(recipe), {"store": run.store.name, "selections": selections})


def find_run_rows(recipe: Recipe) -> RunRows:
    """Find the rows of a recipe, reading nothing but the store.

    Raises:
        StoreNotFoundError: `precompute` never ran for these teacher and data sections.
    """
    entry = read_entry(recipe.cache, "rows", rows_key(recipe))
    store = open_store(store_path(recipe.cache, entry["store"]))
    return RunRows(store, {split: read_selection(store, name) for split, name in entry["selections"].items()})


def trained_student(recipe: Recipe) -> Path:
    """Return the folder that the trained student is exported to."""
    return Path(recipe.output) / STUDENT


def rows_key(recipe: Recipe) -> dict[str, Any]:
    """Return the sections of a recipe that decide its store and its rows."""
    teacher = recipe.teacher.model_dump(include={"path", "revision", "dtype"})
    return {"teacher": teacher, "data": recipe.data.identity()}
