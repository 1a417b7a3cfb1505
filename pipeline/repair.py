"""Repair the store of a recipe's teacher: drop what is damaged, then run stage one for what the recipe needs."""

from dataclasses import dataclass

from tqdm import tqdm

from coldstill.cache.audit import audit_store, stored_bytes
from coldstill.cache.errors import CorruptError, StoreNotFoundError
from coldstill.cache.objects import open_objects
from coldstill.cache.repair import Mended, mend_store
from coldstill.cache.root_audit import folder_problems, holds_data, index_problems
from coldstill.cache.store import ROOT_METADATA, Store, create_store, open_store, store_path
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.outputs.run_index import KEPT_FOLDERS
from coldstill.pipeline.precompute import PrecomputeSummary, precompute
from coldstill.pipeline.recipe.sections import Recipe


@dataclass(frozen=True)
class RepairSummary:
    """What a repair did.

    Attributes:
        store: The store's folder or URL.
        mended: What was dropped, rewritten and adopted in the store.
        removed: Index entries and students that were damaged and are gone.
        precompute: The run of stage one that followed.
    """

    store: str
    mended: Mended
    removed: list[str]
    precompute: PrecomputeSummary


def repair(recipe: Recipe, *, show_progress: bool = True) -> RepairSummary:
    """Drop what is damaged in the store of a recipe's teacher, then run stage one for what the recipe needs.

    Raises:
        InUseError: Another process writes the store.
        FormatError: The store was written by another version of the format.
        ColdstillError: What `precompute` raises.
    """
    teacher = Teacher.locate(recipe.teacher)
    objects = open_objects(recipe.cache)
    store = _openable_store(recipe, teacher)
    with tqdm(total=stored_bytes(store), unit="B", unit_scale=True, desc="verify", disable=not show_progress) as bar:
        mended = mend_store(store, audit_store(store, on_bytes=bar.update))
    removed = []
    for problem in [*index_problems(objects, kept=KEPT_FOLDERS), *folder_problems(objects, kept=KEPT_FOLDERS)]:
        removed.append(problem.file)
        if problem.kind in KEPT_FOLDERS:
            objects.remove_folder(problem.file)
        else:
            objects.remove(problem.file)
    return RepairSummary(store.path, mended, removed, precompute(recipe, show_progress=show_progress))


def _openable_store(recipe: Recipe, teacher: Teacher) -> Store:
    """Open the store of a recipe's teacher, with its root metadata written anew where that is damaged."""
    path = store_path(recipe.cache, teacher.fingerprint)
    objects = open_objects(path)
    try:
        return open_store(path)
    except CorruptError:
        objects.remove(ROOT_METADATA)
    except StoreNotFoundError:
        if not holds_data(objects):
            raise
    return create_store(recipe.cache, teacher.describe())
