"""The stage `prune`: make a recipe's student from its teacher, once."""

from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.runtime.interruptions import what_stays
from coldstill.pipeline.stage_one.preflight import check_before_teacher
from coldstill.pipeline.stage_one.requests import recipe_rows
from coldstill.pipeline.students.preparing import PreparedStudent, check_student, prepare_student


def prune(recipe: Recipe) -> PreparedStudent:
    """Make the recipe's student, where it is not there yet.

    Raises:
        ColdstillError: The recipe's teacher, data or student section cannot be carried out.
    """
    with what_stays(lambda: "before the student was made; the same command begins anew"):
        teacher = Teacher.locate(recipe.teacher)
        check_student(recipe, teacher)
        check_before_teacher(recipe, teacher)
        return prepare_student(recipe, teacher, recipe_rows(recipe, teacher)["train"])
