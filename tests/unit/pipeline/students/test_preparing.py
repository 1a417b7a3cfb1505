"""A student is named by all that decides it, made once, and judged on rows that it was not fitted to."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldstill.cache.errors import CorruptError
from coldstill.cache.kept_folders import CHECKSUMS
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.recipe.student import InitConfig, PruneConfig
from coldstill.pipeline.rows.building import build_rows
from coldstill.pipeline.rows.kept_rows import Rows
from coldstill.pipeline.students.preparing import calibration_rows, prepare_student, student_name

LAST = {"layers": {"remove": 1, "method": "last"}}
ROWS = [np.arange(start, start + 12, dtype=np.uint32) for start in range(4)]


@pytest.fixture
def located(write_recipe: Callable[..., Path]) -> Teacher:
    return Teacher.locate(load_recipe(write_recipe()).teacher)


def name(teacher: Teacher, section: dict[str, Any], rows: list[np.ndarray] = ROWS) -> str:
    return student_name(PruneConfig(**section), teacher, rows)


def test_each_cut_has_a_name_of_its_own_and_the_same_cut_the_same_one(located: Teacher):
    sections = [
        LAST,
        {"layers": {"remove": 2, "method": "last"}},
        {"layers": {"remove": 1}},
        {"mlp": {"keep": 0.5}},
        {"mlp": {"keep": 0.5}, "reconstruct": False},
        {**LAST, "reconstruct": "linear"},
        {**LAST, "reconstruct": "blocks"},
        {**LAST, "reconstruct": False},
    ]
    names = [name(located, section) for section in sections]
    assert len(set(names)) == len(names)
    assert names == [name(located, section) for section in sections]
    assert student_name(InitConfig(compression=0.6), located, ROWS) not in names
    assert not located.is_loaded, "a name needs no weights"


def test_rows_decide_a_student_where_they_are_read_and_only_there(located: Teacher):
    by_rows, by_place = {"mlp": {"keep": 0.5}}, {**LAST, "reconstruct": False}
    assert name(located, by_rows, ROWS[:2]) != name(located, by_rows, ROWS[2:])
    assert name(located, by_place, ROWS[:2]) == name(located, by_place, ROWS[2:])


def test_what_true_means_is_no_other_student(located: Teacher):
    assert name(located, {**LAST, "reconstruct": True}) == name(located, {**LAST, "reconstruct": "linear"})


def test_another_teacher_makes_another_student(located: Teacher, workplace: Path, write_recipe: Callable[..., Path]):
    other = Teacher.locate(load_recipe(write_recipe(teacher__path=str(workplace / "narrow"))).teacher)
    assert name(other, LAST) != name(located, LAST)


def prepared(recipe: Recipe) -> tuple[Any, Teacher, Rows]:
    teacher = Teacher.locate(recipe.teacher)
    rows, _ = build_rows(recipe.data, teacher.tokenizer)
    return prepare_student(recipe, teacher, rows), teacher, rows


def test_a_student_is_made_once_and_found_again_without_the_teachers_weights(write_recipe: Callable[..., Path]):
    recipe = load_recipe(write_recipe())
    made, teacher, _ = prepared(recipe)
    assert made.was_made
    assert teacher.is_loaded
    assert (made.folder / CHECKSUMS).is_file()
    found, teacher, _ = prepared(recipe)
    assert (found.was_made, found.folder, found.report) == (False, made.folder, made.report)
    assert not teacher.is_loaded


def test_a_student_that_was_altered_is_refused_and_not_made_again(write_recipe: Callable[..., Path]):
    recipe = load_recipe(write_recipe())
    made, _, _ = prepared(recipe)
    config = made.folder / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(CorruptError, match=r"config\.json is not what was written"):
        prepared(recipe)


@pytest.mark.parametrize(("calibration", "judged", "are_calibration"), [(14, 4, False), (18, 2, False), (20, 4, True)])
def test_it_is_judged_on_four_rows_behind_those_that_it_was_fitted_to_where_there_are_so_many(
    write_recipe: Callable[..., Path], calibration: int, judged: int, are_calibration: bool
):
    recipe = load_recipe(write_recipe(student__prune={"mlp": {"keep": 0.5}, "calibration_rows": calibration}))
    made, _, rows = prepared(recipe)
    assert len(calibration_rows(recipe.student.prune, rows)) == calibration
    assert made.report["judged"]["num_tokens"] == judged * 23
    assert made.report["judged"]["are_calibration"] is are_calibration


def test_a_student_that_is_there_already_is_taken_as_it_is(write_recipe: Callable[..., Path], workplace: Path):
    recipe = load_recipe(write_recipe(student={"path": str(workplace / "narrow")}))
    found, teacher, _ = prepared(recipe)
    assert (found.folder, found.was_made, found.report) == (workplace / "narrow", False, None)
    assert not teacher.is_loaded
    assert json.loads((found.folder / "config.json").read_text())["hidden_size"] == 16
