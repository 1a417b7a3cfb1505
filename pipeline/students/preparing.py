"""A recipe's student, found or made of the teacher: once, and kept beside the stores by content."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coldstill.cache.identity import FINGERPRINT_CHARS, digest_of, row_id
from coldstill.pipeline.models import check_length, check_tokenizers, check_vocabularies, load_config
from coldstill.pipeline.models.quantised import quantisation_of
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.outputs.provenance import write_record
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.recipe.student import InitConfig, PruneConfig
from coldstill.pipeline.rows.kept_rows import Rows
from coldstill.pipeline.runtime.errors import RecipeError
from coldstill.pipeline.runtime.whole import whole_folder, write_whole
from coldstill.pipeline.students.folders import (
    check_student_files,
    find_student,
    has_student,
    publish_student,
    students_folder,
    write_checksums,
)
from coldstill.pipeline.students.making import check_student_section, make_student
from coldstill.pipeline.students.pruning_record import PRUNING_FILE, read_pruning, write_kept_channels
from coldstill.pipeline.students.pruning_report import JudgedRows

# Part of a student's name: a change of how students are made makes those that are kept stale.
_VERSION = 3
# The same of how blocks are trained, part of the names of those whose blocks may be.
_BLOCKS_VERSION = 2
# What a student is compared with its teacher on: enough to see what was lost.
_JUDGED_ROWS = 4


@dataclass(frozen=True)
class PreparedStudent:
    """A student that is ready to be trained.

    Attributes:
        folder: Where it is.
        was_made: Whether it was made of the teacher just now.
        report: What was cut and what that cost; None where the student was not made here.
        seconds: What making it took.
    """

    folder: Path
    was_made: bool
    report: dict[str, Any] | None
    seconds: float


def check_student(recipe: Recipe, teacher: Teacher) -> None:
    """Refuse, before any work, a student that cannot learn from the teacher.

    Raises:
        ModelError: Vocabularies differ, or the student's folder holds no model.
        RecipeError: What is to be cut is not there, or weights are quantised that would be cut or trained.
    """
    section = recipe.student.made_from_teacher
    if section is not None:
        _check_cuttable(section, teacher)
        check_student_section(section, teacher.config)
        return
    folder = find_student(recipe)
    config = load_config(folder, trust_remote_code=recipe.student.trust_remote_code)
    if method := quantisation_of(config):
        raise RecipeError(
            f"student.path {folder} has weights quantised by {method}, which training cannot move: give the model that "
            "they were made of"
        )
    check_vocabularies(teacher.config, config)
    check_length(config, recipe.data.sequence_length, who="student")
    check_tokenizers(teacher.tokenizer, folder, trust_remote_code=recipe.student.trust_remote_code)


def _check_cuttable(section: PruneConfig | InitConfig, teacher: Teacher) -> None:
    if teacher.quantisation is not None:
        key = "student.prune" if isinstance(section, PruneConfig) else "student.init"
        raise RecipeError(
            f"{key} makes the student of the teacher's weights, and those of {teacher.folder} are quantised by "
            f"{teacher.quantisation}: give a student.path, such as one made of the teacher before it was quantised"
        )


def prepare_student(recipe: Recipe, teacher: Teacher, train_rows: Rows) -> PreparedStudent:
    """Find the recipe's student, or make it of the teacher; the teacher is loaded only for that."""
    section = recipe.student.made_from_teacher
    if section is None:
        return PreparedStudent(find_student(recipe), was_made=False, report=None, seconds=0.0)
    started = time.monotonic()
    calibration = calibration_rows(section, train_rows)
    folder = students_folder(recipe) / student_name(section, teacher, calibration)
    was_made = not has_student(recipe, folder)
    if was_made:
        _make(recipe, section, teacher, train_rows, folder)
    else:
        check_student_files(folder)
    publish_student(recipe, folder)
    return PreparedStudent(folder, was_made, read_pruning(folder), time.monotonic() - started)


def calibration_rows(section: PruneConfig | InitConfig, train_rows: Rows) -> list[np.ndarray]:
    """Return the rows that decide what goes, and that what stays is fitted to.

    Where a recipe does not say how many, some of few rows are left to judge the student on.
    """
    number = section.num_calibration_rows
    if section.calibration_rows is None:
        number = min(number, max(1, len(train_rows.tokens) - max(1, len(train_rows.tokens) // 5)))
    return train_rows.tokens[:number]


def student_name(section: PruneConfig | InitConfig, teacher: Teacher, calibration: Sequence[np.ndarray]) -> str:
    """Name a student by all that decides it."""
    how = section.model_dump(exclude={"calibration_rows"}, exclude_none=True)
    if how["reconstruct"] == "linear":
        how["reconstruct"] = True  # as it was called when the first students were named
    rows = [row_id(tokens).hex() for tokens in calibration] if section.needs_calibration else []
    facts = {"version": _VERSION, "teacher": teacher.fingerprint, type(section).__name__: how, "calibration": rows}
    if section.reconstruct in ("auto", "blocks"):
        facts["blocks_version"] = _BLOCKS_VERSION
    return digest_of(facts)[:FINGERPRINT_CHARS]


def _make(
    recipe: Recipe,
    section: PruneConfig | InitConfig,
    teacher: Teacher,
    train_rows: Rows,
    folder: Path,
) -> None:
    if teacher.placement == "streamed":
        _check_streamed(section)
    calibration = calibration_rows(section, train_rows)
    # Rows behind those that it is fitted to; where there are none, these.
    judged = train_rows.tokens[len(calibration) : len(calibration) + _JUDGED_ROWS] or calibration[:_JUDGED_ROWS]
    student = make_student(
        section,
        teacher.parts,
        [torch.from_numpy(tokens) for tokens in calibration],
        JudgedRows(
            [torch.from_numpy(tokens) for tokens in judged],
            are_calibration=len(train_rows.tokens) <= len(calibration),
            teacher_loss=teacher.loss_on(judged),
        ),
    )
    with whole_folder(folder) as partial:
        student.model.save_pretrained(partial)
        teacher.tokenizer.save_pretrained(partial)
        write_record(partial, recipe, {"teacher": teacher.fingerprint})
        write_whole(partial / PRUNING_FILE, json.dumps(student.report, indent=1) + "\n")
        if student.kept_channels is not None:
            write_kept_channels(partial, student.kept_channels)
        write_checksums(partial)


def _check_streamed(section: PruneConfig | InitConfig) -> None:
    """Refuse ways of making a student that need more than a few passes over the blocks of a teacher that streams in.

    Raises:
        RecipeError: It is one of them.
    """
    why = None
    if isinstance(section, InitConfig) and section.weights == "interpolate":
        why = "student.init.weights interpolate reads all blocks at once: use copy or truncate"
    elif isinstance(section, PruneConfig) and section.layers is not None and section.layers.method == "kl":
        why = "student.prune.layers.method kl runs blocks thousands of times, each read anew: use importance"
    if why is not None:
        raise RecipeError(
            f"the teacher streams in, two blocks at a time, and {why}; or make the student once where the teacher fits "
            "into memory: coldstill prune with teacher.placement=whole, on teacher.device=cpu"
        )
