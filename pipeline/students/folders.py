"""Where students are: the path that a recipe names, or the folder of a student that was pruned for it.

Pruned students are kept beside the stores by content. A root on object storage keeps them there too, and each machine
has a copy in a local folder, which is what transformers reads. `checksums.json` is written last: a student without it
was never finished.
"""

from pathlib import Path
from typing import Any

from coldstill.cache import kept_folders
from coldstill.cache.array_object import REPAIR_HINT
from coldstill.cache.errors import CorruptError, StoreNotFoundError
from coldstill.cache.index import read_entry, write_entry
from coldstill.cache.kept_folders import CHECKSUMS, find_damage
from coldstill.cache.objects import full_path, open_objects
from coldstill.pipeline.models import resolve_folder
from coldstill.pipeline.outputs.places import beside_stores
from coldstill.pipeline.outputs.provenance import PROVENANCE_FILE, RECIPE_FILE
from coldstill.pipeline.outputs.run_index import PRUNED_STUDENTS, STUDENT, rows_key
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.runtime.whole import whole_folder

_RECORD = (PROVENANCE_FILE, RECIPE_FILE)


def students_folder(recipe: Recipe) -> Path:
    """Return the local folder that pruned students are in: beside the stores, or a copy where those are remote."""
    return beside_stores(recipe) / PRUNED_STUDENTS


def publish_student(recipe: Recipe, folder: Path) -> None:
    """Let the recipe's teacher, data and student sections lead to a pruned student."""
    if "://" in recipe.cache:
        kept_folders.publish_folder(open_objects(recipe.cache), f"{PRUNED_STUDENTS}/{folder.name}", folder)
    write_entry(recipe.cache, STUDENT, _student_key(recipe), {"folder": folder.name})


def find_student(recipe: Recipe) -> Path:
    """Find the folder of a recipe's student: the path that it names, or the student pruned for it.

    Raises:
        ModelError: The path leads to no model.
        StoreNotFoundError: The student was not pruned yet, or its folder is gone.
        CorruptError: The pruned student's files are not what was written.
    """
    if recipe.student.path is not None:
        return resolve_folder(recipe.student.path, revision=recipe.student.revision)
    folder = students_folder(recipe) / read_entry(recipe.cache, STUDENT, _student_key(recipe))["folder"]
    if not has_student(recipe, folder):
        raise StoreNotFoundError(f"the pruned student in {full_path(folder)} is gone; run: coldstill prune")
    check_student_files(folder)
    return folder


def has_student(recipe: Recipe, folder: Path) -> bool:
    """Whether a pruned student is there, after it was copied from object storage where it has to be.

    Raises:
        CorruptError: The student on object storage is not what was written.
    """
    is_there = (folder / CHECKSUMS).is_file()
    if "://" not in recipe.cache:
        return is_there
    if is_there and find_damage(open_objects(folder.parent), folder.name) is None:
        return True
    objects = open_objects(recipe.cache)
    remote = f"{PRUNED_STUDENTS}/{folder.name}"
    if not objects.exists(f"{remote}/{CHECKSUMS}"):
        return False
    with whole_folder(folder) as partial:
        if what := kept_folders.fetch_folder(objects, remote, partial):
            raise CorruptError(f"the pruned student in {recipe.cache}/{remote} is corrupt: {what}; {REPAIR_HINT}")
    return True


def write_checksums(folder: Path) -> None:
    """Write the sha256 of every file that makes a student what it is; with that it is complete.

    The record of how it was made is left out: two machines that make the same student make the same checksums.
    """
    kept_folders.write_checksums(folder, without=_RECORD)


def check_student_files(folder: Path) -> None:
    """Hold a pruned student's files against their checksums.

    Raises:
        CorruptError: One is missing or altered.
    """
    if what := find_damage(open_objects(folder.parent), folder.name):
        raise CorruptError(f"the pruned student in {folder} is corrupt: {what}; {REPAIR_HINT}")


def _student_key(recipe: Recipe) -> dict[str, Any]:
    # What is trained of it decides nothing of what was cut.
    student = {key: value for key, value in recipe.student.identity().items() if key != "lora"}
    return {**rows_key(recipe), "student": student}
