"""The stage `prune`: make a recipe's student from its teacher, once, and keep it beside the stores by content."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cache.identity import FINGERPRINT_CHARS, digest_of, row_id
from pipeline.config import Recipe
from pipeline.data import Rows, build_rows
from pipeline.models import check_tokenizers, check_vocabularies, load_config
from pipeline.provenance import write_record
from pipeline.student_config import PruneConfig
from pipeline.student_folders import (
    find_student,
    has_student,
    pruned_from,
    publish_student,
    students_folder,
    write_checksums,
)
from pipeline.students import block_importances, check_prune, choose_kept_blocks, cut_blocks
from pipeline.teacher import Teacher
from pipeline.whole import whole_folder


@dataclass(frozen=True)
class PreparedStudent:
    """A student that is ready to be trained.

    Attributes:
        folder: Where it is.
        was_made: Whether it was pruned just now.
        kept_blocks: The teacher blocks that it was cut from, or None where it was not pruned here.
        seconds: What making it took.
    """

    folder: Path
    was_made: bool
    kept_blocks: list[int] | None
    seconds: float


def prune(recipe: Recipe) -> PreparedStudent:
    """Make the recipe's student, where it is not there yet.

    Raises:
        ColdstillError: The recipe's teacher, data or student section cannot be carried out.
    """
    teacher = Teacher.locate(recipe.teacher)
    check_student(recipe, teacher)
    train_rows, _ = build_rows(recipe.data, teacher.tokenizer)
    return prepare_student(recipe, teacher, train_rows)


def check_student(recipe: Recipe, teacher: Teacher) -> None:
    """Refuse, before any work, a student that cannot learn from the teacher.

    Raises:
        ModelError: Vocabularies differ, or the student's folder holds no model.
        RecipeError: Blocks are to be removed that the teacher does not have.
    """
    if recipe.student.prune is not None:
        check_prune(recipe.student.prune.layers, num_blocks=teacher.num_blocks)
        return
    folder = find_student(recipe)
    check_vocabularies(teacher.config, load_config(folder, trust_remote_code=recipe.student.trust_remote_code))
    check_tokenizers(teacher.folder, folder)


def prepare_student(recipe: Recipe, teacher: Teacher, train_rows: Rows) -> PreparedStudent:
    """Find the recipe's student, or prune the teacher for it; the teacher is loaded only for that."""
    if recipe.student.prune is None:
        return PreparedStudent(find_student(recipe), was_made=False, kept_blocks=None, seconds=0.0)
    started = time.monotonic()
    section = recipe.student.prune
    calibration = calibration_rows(section, train_rows)
    folder = students_folder(recipe) / student_name(section, teacher, calibration)
    was_made = not has_student(recipe, folder)
    if was_made:
        _make(recipe, section, teacher, calibration, folder)
    publish_student(recipe, folder)
    return PreparedStudent(folder, was_made, pruned_from(folder), time.monotonic() - started)


def calibration_rows(section: PruneConfig, train_rows: Rows) -> list[np.ndarray]:
    """Give the rows that decide which blocks go; none where the recipe decides it."""
    return train_rows.tokens[: section.calibration_rows] if section.layers.method == "importance" else []


def student_name(section: PruneConfig, teacher: Teacher, calibration: Sequence[np.ndarray]) -> str:
    """Name a pruned student by all that decides it."""
    layers = section.layers.model_dump(exclude={"calibration_rows"})
    rows = [row_id(tokens).hex() for tokens in calibration]
    return digest_of({"teacher": teacher.fingerprint, "layers": layers, "calibration": rows})[:FINGERPRINT_CHARS]


def _make(
    recipe: Recipe, section: PruneConfig, teacher: Teacher, calibration: Sequence[np.ndarray], folder: Path
) -> None:
    importances = None
    if section.layers.method == "importance":
        importances = block_importances(teacher.parts, [torch.from_numpy(tokens) for tokens in calibration])
    kept = choose_kept_blocks(section.layers, num_blocks=teacher.num_blocks, importances=importances)
    student = cut_blocks(teacher.parts, kept)
    with whole_folder(folder) as partial:
        student.save_pretrained(partial)
        teacher.tokenizer.save_pretrained(partial)
        facts = {"teacher": teacher.fingerprint, "kept_blocks": kept, "block_importances": importances}
        write_record(partial, recipe, facts)
        write_checksums(partial)
