"""The standardised loss of states means the same on every model: its scale is 1, and nothing that is huge rules it."""

import math

import pytest
import torch
from torch import Tensor, nn

from coldstill.pipeline.losses.block_losses import MappedStates, block_losses
from coldstill.pipeline.losses.dynamics import Dynamics
from coldstill.pipeline.losses.hidden import Hidden
from coldstill.pipeline.losses.state_losses import (
    BlockScales,
    StateScale,
    hidden_normalised_mse,
    hidden_standardised_mse,
)
from coldstill.pipeline.targets.encodings import StateForm
from coldstill.pipeline.targets.forms import HiddenForm

N, D, SINK = 300, 12, 7


def drawn(seed: int) -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def teacher() -> Tensor:
    """States as models have them: a huge channel about a large mean, a tiny one, and a sink in two channels."""
    states = drawn(0) * torch.tensor([300.0, 0.2, *[1.0] * (D - 2)]) + torch.tensor([900.0, 0.0, *[0.3] * (D - 2)])
    states[SINK, 2:4] += 40_000.0
    return states


@pytest.fixture
def student(teacher: Tensor) -> Tensor:
    return teacher + 0.5 * drawn(1) * teacher.abs().median(dim=0).values


def test_a_student_that_knows_the_mean_alone_is_off_by_one_on_every_model(teacher: Tensor):
    ordinary = torch.arange(N) != SINK
    mean = teacher[ordinary].mean(dim=0)
    for scale in (1e-3, 1.0, 1e3):
        loss_N = hidden_standardised_mse((scale * mean).expand(N, D), scale * teacher)
        assert loss_N[ordinary].mean().item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("factor", [1e-3, 4.0, 1e4])
def test_scaling_both_streams_changes_neither_the_loss_nor_the_relative_gradient(
    teacher: Tensor, student: Tensor, factor: float
):
    points = [(scale * student).requires_grad_() for scale in (1.0, factor)]
    scales = [StateScale.of(scale * teacher) for scale in (1.0, factor)]
    losses = [
        hidden_standardised_mse(point, scale * teacher, known)
        for point, scale, known in zip(points, (1.0, factor), scales, strict=True)
    ]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
    want, got = (torch.autograd.grad(loss.sum(), point)[0] for loss, point in zip(losses, points, strict=True))
    torch.testing.assert_close(got * factor, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("factor", [10.0, 1e4])
def test_how_large_a_sink_is_changes_nothing(teacher: Tensor, student: Tensor, factor: float):
    want = hidden_standardised_mse(student, teacher)
    for states in (teacher, student):
        states[SINK] *= factor
    torch.testing.assert_close(hidden_standardised_mse(student, teacher), want, rtol=1e-3, atol=1e-6)


def test_a_student_that_lacks_a_sink_is_drawn_to_it(teacher: Tensor):
    point = teacher.clone()
    point[SINK, 2:4] -= 40_000.0
    point.requires_grad_()
    loss_N = hidden_standardised_mse(point, teacher)
    loss_N.sum().backward()
    assert loss_N[SINK].item() == pytest.approx(16.0, rel=1e-3)
    assert point.grad is not None
    assert (point.grad[SINK, 2:4] < 0).all()
    assert not point.grad[torch.arange(N) != SINK].any()


def test_a_huge_channel_counts_as_any_other(teacher: Tensor):
    off = torch.zeros(D)
    for channel, spread in ((0, 300.0), (5, 1.0)):
        off = torch.zeros(D).index_fill(0, torch.tensor(channel), 0.5 * spread)
        ordinary = hidden_standardised_mse(teacher + off, teacher)[:SINK].mean()
        assert ordinary.item() == pytest.approx(0.25 / D, rel=0.2)
    assert hidden_normalised_mse(teacher + off, teacher)[:SINK].mean() < 1e-5


def test_a_channel_that_hardly_moves_does_not_rule(teacher: Tensor):
    teacher[:, 1] = 0.0
    off = torch.zeros(D).index_fill(0, torch.tensor(1), 0.01)
    assert hidden_standardised_mse(teacher + off, teacher)[:SINK].max() < 1e-2


@pytest.mark.parametrize("num", [1, 2])
def test_very_few_positions_and_states_of_zero_have_a_scale(num: int):
    for states in (drawn(2)[:num], torch.zeros(num, D)):
        loss_N = hidden_standardised_mse(1.1 * states + 1e-9, states)
        assert loss_N.isfinite().all()


def test_the_gradient_is_that_of_finite_differences_at_an_ordinary_position_and_at_a_sink(
    teacher: Tensor, student: Tensor
):
    scale = StateScale.of(teacher)
    point = student.double().requires_grad_()
    scale = StateScale(scale.mean_D.double(), scale.variance_D.double())

    def loss(states: Tensor) -> Tensor:
        # In float64, where differences of a tenth of a percent still have digits.
        return (scale.error(states, teacher.double()) * scale.position_weights(teacher.double())).sum()

    of_definition = torch.autograd.grad(loss(point), point)[0]
    own = student.clone().requires_grad_()
    hidden_standardised_mse(own, teacher, StateScale.of(teacher)).sum().backward()
    torch.testing.assert_close(own.grad, of_definition.float(), rtol=1e-3, atol=1e-7)
    for position, channel in ((3, 0), (3, 1), (SINK, 2)):
        step = 1e-3 * math.sqrt(scale.variance_D[channel])
        moved = [student.double().clone() for _ in range(2)]
        moved[0][position, channel] += step
        moved[1][position, channel] -= step
        slope = (loss(moved[0]) - loss(moved[1])) / (2 * step)
        assert of_definition[position, channel].item() == pytest.approx(slope.item(), rel=1e-4, abs=1e-9)


def test_states_and_their_changes_are_measured_by_scales_of_their_own(teacher: Tensor):
    layer_map = {0: 1, 2: 4}
    after = teacher + 0.1 * drawn(3)
    stored = {"1": {"values": teacher[None]}, "4": {"values": after[None]}}
    outputs = {0: (teacher + drawn(4))[None].requires_grad_(), 2: (after + drawn(5))[None].requires_grad_()}
    scales = BlockScales.of([(0, teacher), (2, after)])
    states = MappedStates(layer_map, outputs, stored, HiddenForm(StateForm("float32")), torch.arange(N), None, scales)
    terms = [Hidden(1.0, "standardised_mse"), Dynamics(1.0, "standardised_mse")]
    identity = nn.ModuleDict({str(block): nn.Identity() for block in layer_map})
    got = block_losses(terms, states, identity, num_positions=N)
    want = {
        "loss_hidden": torch.stack(
            [
                hidden_standardised_mse(outputs[own][0], states, StateScale.of(states)).mean()
                for own, states in ((0, teacher), (2, after))
            ]
        ).mean(),
        "loss_dynamics": hidden_standardised_mse(
            outputs[2][0] - outputs[0][0], after - teacher, StateScale.of(after - teacher)
        ).mean(),
    }
    for name, value in want.items():
        assert got[name].item() == pytest.approx(value.item(), rel=1e-5)
    # The change is a tenth of what the states do: the same error weighs more in it.
    assert got["loss_dynamics"] > 10 * hidden_standardised_mse(outputs[2][0], after).mean()
