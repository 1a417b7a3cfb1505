"""Projectors fitted by least squares: the known map is found, and the hidden loss is at its least."""

import pytest
import torch
from torch import Tensor

from coldstill.pipeline.losses.hidden import Hidden
from coldstill.pipeline.losses.objective import Objective
from coldstill.pipeline.models.projectors import create_projectors
from coldstill.pipeline.models.student_forward import StudentForward
from coldstill.pipeline.stage_two.distiller import Distiller, TargetForms
from coldstill.pipeline.stage_two.warm_start import fit_projectors
from coldstill.pipeline.targets.encodings import StateForm
from coldstill.pipeline.targets.forms import HiddenForm

LAYER_MAP = {1: 2, 3: 5}
TEACHER_WIDTH = 40
IDS = torch.arange(1, 241).reshape(4, 60)


@pytest.fixture
def student(build_model):
    return build_model(hidden_size=16, intermediate_size=24, num_attention_heads=2)


def distiller_of(student, *, kind: str = "linear", hidden: str = "mse", width: int = TEACHER_WIDTH) -> Distiller:
    projectors = create_projectors(LAYER_MAP, student_dim=16, teacher_dim=width, kind=kind, seed=1)
    objective = Objective((Hidden(1.0, hidden),))
    forms = TargetForms(hidden=HiddenForm(StateForm("float32")))
    return Distiller(student, projectors, layer_map=LAYER_MAP, objective=objective, forms=forms)


def batch_of(student, *, noise: float = 0.0) -> tuple[dict, dict[int, Tensor]]:
    """A teacher whose states are linear maps of the student's, and some noise."""
    generator = torch.Generator().manual_seed(3)
    maps = {block: torch.randn(TEACHER_WIDTH, 16, generator=generator) for block in LAYER_MAP}
    with torch.no_grad():
        outputs, _, _ = StudentForward(student)(IDS, None, list(LAYER_MAP))
    hidden = {
        str(teacher): {
            "values": outputs[own] @ maps[own].T + noise * torch.randn(4, 60, TEACHER_WIDTH, generator=generator)
        }
        for own, teacher in LAYER_MAP.items()
    }
    return {"input_ids": IDS, "labels": IDS, "hidden": hidden}, maps


def test_a_linear_teacher_is_met_exactly(student):
    distiller = distiller_of(student)
    batch, maps = batch_of(student)
    fit_projectors(distiller, [{**batch, "input_ids": IDS}])
    for block in LAYER_MAP:
        torch.testing.assert_close(distiller.projectors[str(block)].linear.weight, maps[block], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("hidden", ["mse", "normalised_mse", "standardised_mse", "cosine"])
def test_no_small_change_of_the_fitted_map_is_better(student, hidden):
    batch, _ = batch_of(student, noise=0.2)
    distiller = distiller_of(student, hidden=hidden)
    if hidden == "standardised_mse":
        distiller.measure_scales([batch])
    before = distiller(**batch)["loss_hidden"].item()
    fit_projectors(distiller, [batch])
    fitted = distiller(**batch)["loss_hidden"]
    assert fitted.item() < 0.5 * before
    if hidden == "cosine":
        return  # of which the weighted squares are only near to it
    for gradient in torch.autograd.grad(fitted, [*distiller.projectors.parameters()]):
        assert gradient.abs().max() < 1e-4 * before


def test_batches_add_up_to_the_whole(student):
    batch, _ = batch_of(student, noise=0.2)
    halves = [
        {
            "input_ids": IDS[rows],
            "labels": IDS[rows],
            "hidden": {name: {"values": arrays["values"][rows]} for name, arrays in batch["hidden"].items()},
        }
        for rows in (slice(0, 1), slice(1, 4))
    ]
    whole, parts = distiller_of(student), distiller_of(student)
    fit_projectors(whole, [batch])
    fit_projectors(parts, halves)
    for one, other in zip(whole.projectors.parameters(), parts.projectors.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_last_map_of_an_mlp_is_fitted_and_the_first_stays(student):
    batch, _ = batch_of(student, noise=0.2)
    distiller = distiller_of(student, kind="mlp")
    first = distiller.projectors["1"].enter.weight.clone()
    before = distiller(**batch)["loss_hidden"].item()
    fit_projectors(distiller, [batch])
    assert distiller(**batch)["loss_hidden"].item() < 0.5 * before
    assert torch.equal(distiller.projectors["1"].enter.weight, first)


def test_identities_are_left_alone_and_training_mode_stays(student):
    distiller = distiller_of(student, kind="auto", width=16).train()
    outputs, _, _ = StudentForward(student)(IDS, None, list(LAYER_MAP))
    hidden = {str(teacher): {"values": outputs[own].detach()} for own, teacher in LAYER_MAP.items()}
    fit_projectors(distiller, [{"input_ids": IDS, "labels": IDS, "hidden": hidden}])
    assert distiller.training
    assert distiller(IDS, IDS, hidden=hidden)["loss_hidden"].item() == 0.0
