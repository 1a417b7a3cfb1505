"""What a recipe may name is said once, in the recipe; whoever does it knows exactly these names."""

from typing import get_args

import pytest

from coldstill.pipeline.losses.divergences import DIVERGENCES, Divergence
from coldstill.pipeline.losses.objective import TERMS
from coldstill.pipeline.losses.schedules import SHAPES
from coldstill.pipeline.losses.state_losses import HIDDEN_LOSSES, HIDDEN_UNITS, POSITION_WEIGHTS
from coldstill.pipeline.models.layer_map import create_layer_map
from coldstill.pipeline.models.projectors import create_projectors
from coldstill.pipeline.recipe.loss import (
    DIVERGENCE_WEIGHTS,
    TERM_KEYS,
    DivergenceName,
    HiddenLoss,
    LossConfig,
    LossWeight,
    SchedulesConfig,
    ScheduleShape,
    TargetName,
    TermName,
)
from coldstill.pipeline.recipe.sections import MappingStrategy, ProjectorKind, TargetsConfig


def test_the_terms_of_the_loss_are_those_of_the_recipe_in_its_order():
    assert [term.name for term in TERMS] == list(TERM_KEYS) == list(get_args(TermName))


def test_every_term_has_a_weight_of_its_own_which_may_have_a_schedule():
    weights = [keys.weight for keys in TERM_KEYS.values()]
    assert weights == list(get_args(LossWeight))
    assert set(weights) <= LossConfig.model_fields.keys()
    assert SchedulesConfig.model_fields.keys() == {*weights, "temperature"}


def test_terms_learn_from_the_sections_of_the_targets():
    sections = TargetsConfig.model_fields.keys() - {"source"}  # which says where they come from
    assert set(get_args(TargetName)) == sections


def test_divergences_and_hidden_losses_are_those_of_the_recipe():
    assert tuple(DIVERGENCES) == get_args(DivergenceName)
    assert tuple(HIDDEN_LOSSES) == tuple(POSITION_WEIGHTS) == tuple(HIDDEN_UNITS) == get_args(HiddenLoss)


@pytest.mark.parametrize("name", DIVERGENCE_WEIGHTS)
def test_a_divergence_says_the_weight_that_the_recipe_gives_it_or_else_the_default(name: DivergenceName):
    given, default = (Divergence.of(LossConfig(divergence=name, divergence_weight=weight)) for weight in (0.3, None))
    assert given.summary == f"{name} (weight 0.3)"
    assert default.summary == f"{name} (weight {DIVERGENCE_WEIGHTS[name]:g})"


def test_the_shapes_of_schedules_are_those_of_the_recipe():
    assert tuple(SHAPES) == get_args(ScheduleShape)


@pytest.mark.parametrize("strategy", get_args(MappingStrategy))
def test_every_mapping_strategy_maps(strategy: MappingStrategy):
    layer_map = create_layer_map(2, 4, strategy, kept_blocks=[0, 3], pairs={0: 1, 1: 2})
    assert list(layer_map) == [0, 1]


@pytest.mark.parametrize("kind", get_args(ProjectorKind))
def test_every_kind_of_projector_is_made(kind: ProjectorKind):
    made = create_projectors([0], student_dim=4, teacher_dim=4, kind=kind)["0"]
    expected = {"auto": "Identity", "none": "Identity", "linear": "LearnableProjector", "mlp": "MlpProjector"}
    assert type(made).__name__ == expected[kind]
