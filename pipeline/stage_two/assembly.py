"""From what the trainer is given in Python, a student with a teacher beside it or a distiller, to a distiller.

Everything that can be wrong with it is said here, before anything runs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from coldstill.pipeline.losses.objective import Objective
from coldstill.pipeline.models import check_vocabularies, find_structure, text_config
from coldstill.pipeline.models.layer_map import check_pairs
from coldstill.pipeline.models.projectors import check_projectors, create_projectors
from coldstill.pipeline.recipe.file import parse_model
from coldstill.pipeline.recipe.loss import LossConfig
from coldstill.pipeline.runtime.errors import ModelError, RecipeError
from coldstill.pipeline.stage_two.distiller import Distiller, TargetForms

# As a list, the teacher block of each student block.
LayerMap = Mapping[int, int] | Sequence[int]
# As a list, in the order of the student's blocks.
Projectors = nn.ModuleDict | nn.ModuleList

# Whoever maps blocks wants them compared, although a recipe that does not say so does without.
_GAMMA_OF_A_MAP = 0.1


def assemble(
    model: Distiller | PreTrainedModel,
    *,
    teacher: PreTrainedModel | None,
    layer_map: LayerMap | None,
    projectors: Projectors | None,
    weights: Mapping[str, float | None],
) -> Distiller:
    """Return the distiller that a trainer is to train.

    Args:
        model: A distiller, which has a layer map, projectors and a loss, or a student, which is given them.
        teacher: The live teacher; None where batches carry its targets.
        layer_map: Student block to teacher block.
        projectors: By student block.
        weights: `alpha`, `beta`, `gamma`, `delta` and `temperature`; the recipe's defaults where they are None, but for
            gamma where there is a layer map.

    Raises:
        RecipeError: Arguments contradict each other, or are out of range.
        ModelError: Student and teacher do not fit each other.
        TargetError: A term of the loss has a weight, and nothing gives its target.
    """
    for name, value in {"model": model, "teacher_model": teacher}.items():
        if not isinstance(value, Distiller | None) and not hasattr(value, "get_output_embeddings"):
            raise ModelError(
                f"{name} is a {type(value).__name__}; expected a causal language model, as "
                "AutoModelForCausalLM.from_pretrained gives it"
            )
    given = {"layer_map": layer_map, "projectors": projectors, **weights}
    if isinstance(model, Distiller):
        distiller = _whole(model, teacher, [name for name, value in given.items() if value is not None])
    else:
        distiller = _from_student(model, teacher, layer_map, projectors, weights)
    if teacher is None:
        distiller.check_targets()
    else:
        _check_fit(distiller, teacher)
    return distiller


def _whole(distiller: Distiller, teacher: PreTrainedModel | None, given: Sequence[str]) -> Distiller:
    if given:
        raise RecipeError(
            f"model is a Distiller, which has its own layer map, projectors and loss: leave out {', '.join(given)}, or "
            "give the student as model"
        )
    if teacher is not None and distiller.forms != TargetForms() and not distiller.forms.is_live:
        raise RecipeError(
            "model is a Distiller with forms, which reads targets off its batches, and teacher_model would give them "
            "too: leave out one of the two"
        )
    return distiller


def _from_student(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    layer_map: LayerMap | None,
    projectors: Projectors | None,
    weights: Mapping[str, float | None],
) -> Distiller:
    given = {name: value for name, value in weights.items() if value is not None}
    if layer_map is not None and not {"gamma", "delta"} & given.keys():
        given["gamma"] = _GAMMA_OF_A_MAP
    # Of the kinds that mean the same on every model, the one that is not measured first: data sets may be streams.
    section = parse_model(LossConfig, {**given, "hidden": "normalised_mse"}, name="UniversalDistillationTrainer")
    objective = Objective.of(section)
    if not objective.over_blocks:
        return Distiller(student, nn.ModuleDict(), layer_map={}, objective=objective)
    pairs = dict(layer_map if isinstance(layer_map, Mapping) else enumerate(layer_map or ()))
    if projectors is None:
        dims = [_width(model) for model in (student, teacher or student)]
        projectors = create_projectors(pairs, student_dim=dims[0], teacher_dim=dims[1])
    named: dict[str, Any] = dict(projectors.named_children())
    mapped = nn.ModuleDict({str(block): named[str(block)] for block in pairs if str(block) in named})
    return Distiller(student, mapped, layer_map=pairs, objective=objective)


def _check_fit(distiller: Distiller, teacher: PreTrainedModel) -> None:
    """Hold a distiller against a teacher: one vocabulary, blocks that exist, widths that meet, no weight in common."""
    student = distiller.student
    of_teacher = {parameter.data_ptr() for parameter in teacher.parameters()} - {0}
    for name, parameter in student.named_parameters():
        if parameter.data_ptr() in of_teacher:
            raise ModelError(
                f"student and teacher_model share weights, such as {name}: what trains the one would change the other; "
                "make the student of copy.deepcopy(teacher)"
            )
    check_vocabularies(teacher.config, student.config)
    numbers = {}
    for name, model in (("n_student", student), ("n_teacher", teacher)):
        numbers[name] = len(model.get_submodule(find_structure(model).blocks_name))
    distiller.layer_map = check_pairs(distiller.layer_map, **numbers, name="layer_map")
    check_projectors(distiller.projectors, student_dim=_width(student), teacher_dim=_width(teacher))


def _width(model: PreTrainedModel) -> int:
    return int(text_config(model.config).hidden_size)
