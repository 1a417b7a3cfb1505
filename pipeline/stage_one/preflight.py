"""Whatever can be known of a recipe before its teacher runs, checked before it runs. Nothing is loaded or written.

Stage one, its dry run, a plan and a sweep all begin here, so that no teacher works for hours for a training that could
never begin. Training checks the same again by the same functions: it may begin on another machine.
"""

import functools
from pathlib import Path

from transformers import PreTrainedModel

from coldstill.pipeline.judging.tasks import harness_version
from coldstill.pipeline.models import load_config, text_config
from coldstill.pipeline.models.machine import check_device, training_problem
from coldstill.pipeline.models.outlines import outline_of
from coldstill.pipeline.models.pairing import check_layer_map, layer_map_between, layer_map_of
from coldstill.pipeline.models.projectors import check_projector
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.outputs.places import check_places
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.recipe.student import InitConfig
from coldstill.pipeline.runtime.errors import RecipeError
from coldstill.pipeline.runtime.units import format_size
from coldstill.pipeline.stage_two.arguments import check_launch, check_train_section
from coldstill.pipeline.students.folders import find_student
from coldstill.pipeline.students.making import kept_blocks_before_measuring, num_student_blocks, student_width


def check_before_teacher(recipe: Recipe, teacher: Teacher, *, trains_here: bool = False) -> None:
    """Refuse what a teacher's work would be wasted on.

    Args:
        recipe: The recipe, whose student is known to fit the teacher (`students.preparing.check_student`).
        teacher: Its teacher.
        trains_here: Whether training follows on this machine, in one process. Where it may be another's, what this one
            lacks for it is no fault; see `coldstill.pipeline.models.machine.machine_notes`.

    Raises:
        RecipeError: Something in the recipe cannot be carried out.
        RemoteError: Its cache is a URL that nothing here opens.
    """
    check_places(recipe, models=model_folders(recipe, teacher))
    check_device("teacher.device", recipe.teacher.device)
    check_device("evaluate.device", recipe.evaluate.device, is_here=False)
    _check_placement(recipe, teacher)
    if recipe.evaluate.tasks:
        harness_version()
    _check_pairs(recipe, teacher)
    check_widths(recipe, teacher)
    check_train_section(recipe, functools.partial(_student_outline, recipe, teacher))
    if trains_here:
        check_launch(recipe)
        if problem := training_problem(recipe):
            raise RecipeError(problem)


def check_widths(recipe: Recipe, teacher: Teacher) -> None:
    """Refuse a projector that cannot bring the student's width to the teacher's.

    Raises:
        RecipeError: It cannot.
    """
    if recipe.loss.needs_hidden:
        width = int(text_config(teacher.config).hidden_size)
        check_projector(recipe.projector.kind, student_dim=_student_width(recipe, teacher), teacher_dim=width)


def model_folders(recipe: Recipe, teacher: Teacher) -> dict[str, Path]:
    """Return the folders of the models that a recipe reads, by key."""
    folders = {"teacher.path": teacher.folder}
    if recipe.student.path is not None:
        folders["student.path"] = find_student(recipe)
    return folders


def planned_layer_map(recipe: Recipe, teacher: Teacher) -> tuple[dict[int, int], bool]:
    """Return the layer map of a student that need not exist yet, and whether its teacher blocks are decided.

    They are not where student blocks learn from those that they are cut from, and a measurement chooses these.

    Raises:
        RecipeError: The mapping does not fit student and teacher.
    """
    section = recipe.student.made_from_teacher
    if section is None:
        config = load_config(find_student(recipe), trust_remote_code=recipe.student.trust_remote_code)
        return layer_map_of(recipe.mapping, config, num_teacher_blocks=teacher.num_blocks), True
    remaining = num_student_blocks(section, teacher.config)
    kept = kept_blocks_before_measuring(section, teacher.config)
    if kept is None and not (isinstance(section, InitConfig) and section.weights == "interpolate"):
        undecided = layer_map_between(recipe.mapping, remaining, teacher.num_blocks, kept_blocks=range(remaining))
        return undecided, recipe.mapping.strategy not in ("kept", "covered")
    return layer_map_between(recipe.mapping, remaining, teacher.num_blocks, kept_blocks=kept), True


def _check_placement(recipe: Recipe, teacher: Teacher) -> None:
    teacher.check_placement()
    if recipe.targets.is_live and teacher.placement == "streamed":
        raise RecipeError(
            f"targets.source is live, which runs the teacher over every batch of every epoch, and teacher.placement "
            f"{recipe.teacher.placement} would read its {format_size(teacher.weights.total)} of weights for each of "
            "them: set targets.source=stored"
        )


def _check_pairs(recipe: Recipe, teacher: Teacher) -> None:
    if recipe.loss.needs_hidden:
        layer_map, is_decided = planned_layer_map(recipe, teacher)
        check_layer_map(recipe, layer_map, is_decided=is_decided)


def _student_width(recipe: Recipe, teacher: Teacher) -> int:
    section = recipe.student.made_from_teacher
    if section is not None:
        return student_width(section, teacher.config)
    config = load_config(find_student(recipe), trust_remote_code=recipe.student.trust_remote_code)
    return int(text_config(config).hidden_size)


def _student_outline(recipe: Recipe, teacher: Teacher) -> PreTrainedModel:
    section = recipe.student.made_from_teacher
    if section is None:
        trust = recipe.student.trust_remote_code
        return outline_of(load_config(find_student(recipe), trust_remote_code=trust), trust_remote_code=trust)
    # A width of its own changes no name of a module.
    return outline_of(
        teacher.config,
        trust_remote_code=recipe.teacher.trust_remote_code,
        num_blocks=num_student_blocks(section, teacher.config),
    )
