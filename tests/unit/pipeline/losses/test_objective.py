"""The terms of the loss from a recipe's section: which there are, what they weigh at each step, what they need."""

from typing import Any, get_args

import pytest
import torch

from coldstill.pipeline.losses.divergences import Divergence
from coldstill.pipeline.losses.dynamics import Dynamics
from coldstill.pipeline.losses.hidden import Hidden
from coldstill.pipeline.losses.logits import Logits
from coldstill.pipeline.losses.objective import Objective
from coldstill.pipeline.losses.schedules import Schedule
from coldstill.pipeline.losses.task import Task
from coldstill.pipeline.losses.term import Predictions
from coldstill.pipeline.losses.vocabulary_losses import vocabulary_loss
from coldstill.pipeline.models.output_head import PlainLogits
from coldstill.pipeline.recipe.loss import LossConfig, LossWeight

NOTHING: dict[str, Any] = dict.fromkeys(get_args(LossWeight), 0.0)


def objective_of(**section: Any) -> Objective:
    return Objective.of(LossConfig.model_validate({**NOTHING, **section}))


ALONE = {
    "alpha": (Task(0.3), [], 0),
    "beta": (Logits(0.3, Divergence("reverse_kl")), ["logits"], 0),
    "gamma": (Hidden(0.3, "cosine"), ["hidden"], 1),
    "delta": (Dynamics(0.3, "mse"), ["hidden"], 2),
}


@pytest.mark.parametrize("weight", ALONE)
def test_a_weight_alone_makes_its_term_with_what_the_recipe_says_of_it(weight: str):
    term, targets, fewest_pairs = ALONE[weight]
    objective = objective_of(**{weight: 0.3, "divergence": "reverse_kl", "hidden": "cosine", "dynamics": "mse"})
    assert objective.terms == (term,)
    assert [target for target in ("logits", "hidden") if objective.needs(target)] == targets
    assert term.fewest_pairs == fewest_pairs
    assert term.weight_text == f"{weight} = 0.3"


def test_each_term_is_over_the_vocabulary_or_over_blocks():
    objective = objective_of(alpha=1.0, beta=1.0, gamma=1.0, delta=1.0)
    assert [term.name for term in objective.over_vocabulary] == ["loss_task", "loss_logits"]
    assert [term.name for term in objective.over_blocks] == ["loss_hidden", "loss_dynamics"]


def test_a_term_whose_weight_comes_later_is_there_from_the_first_step():
    objective = objective_of(alpha=1.0, beta=0.0, hidden="mse", schedule={"gamma": {"end": 0.5}})
    assert objective.terms == (Task(1.0), Hidden(0.0, "mse", schedule=Schedule("linear", 0.0, 0.5)))
    assert objective.terms[1].weight_text == "gamma = 0, and 0.5 at the last step"


def test_weights_and_temperature_are_those_of_the_step():
    schedule = {"alpha": {"end": 0.0}, "gamma": {"shape": "constant"}, "temperature": {"end": 4.0, "warmup": 0.25}}
    objective = objective_of(alpha=0.8, beta=0.5, gamma=0.1, temperature=2.0, schedule=schedule)
    first, later, last = (objective.at(step, 5) for step in (0, 2, 4))
    assert [term.weight for term in first.terms] == pytest.approx([0.8, 0.5, 0.1])
    assert [term.weight for term in later.terms] == pytest.approx([0.4, 0.5, 0.1])
    assert [term.weight for term in last.terms] == pytest.approx([0.0, 0.5, 0.1])
    assert [step.temperature for step in (first, later, last)] == pytest.approx([2.0, 2.0 + 2.0 / 3, 4.0])
    assert later.moving_values() == pytest.approx({"alpha": 0.4, "gamma": 0.1, "temperature": 2.0 + 2.0 / 3})
    assert objective_of(alpha=1.0).moving_values() == {}


def test_no_terms_over_the_vocabulary_are_a_loss_of_zero():
    state = torch.ones(3, 4, dtype=torch.bfloat16)
    loss, terms = vocabulary_loss([], Predictions(torch.zeros(3)), state_ND=state, head=PlainLogits(4), num_positions=3)
    assert (loss.item(), loss.dtype, terms) == (0.0, torch.float32, {})
