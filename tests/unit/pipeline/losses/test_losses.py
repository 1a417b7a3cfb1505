"""The losses against definitions, finite differences and their bounds."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from student_events import events_of
from torch import Tensor

from coldstill.pipeline.losses.divergences import Divergence
from coldstill.pipeline.losses.logits_targets import BucketedTopk
from coldstill.pipeline.losses.state_losses import HIDDEN_LOSSES, hidden_mse, hidden_normalised_mse
from coldstill.pipeline.losses.task import cross_entropy

N, V, D = 5, 24, 7


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return 4 * torch.randn(N, V, generator=generator), 4 * torch.randn(N, V, generator=generator)


def stored(teacher: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    top = teacher.topk(k, dim=-1)
    return top.values, top.indices, (teacher / temperature).logsumexp(dim=-1)


def kl(student: Tensor, teacher: Tensor, *, k: int, temperature: float) -> Tensor:
    return bucketed_kl(student, *stored(teacher, k, temperature), temperature=temperature, num_positions=N)


def bucketed_kl(
    student: Tensor, values: Tensor, ids: Tensor, normaliser: Tensor, *, temperature: float, num_positions: float
) -> Tensor:
    """The logits loss as the distiller makes it of the stored tokens and a bucket."""
    target = BucketedTopk(values, ids, normaliser, temperature, student.shape[-1])
    divergence_N = Divergence("forward_kl")(events_of(target, slice(0, len(values)), student))
    return divergence_N.sum() * temperature**2 / num_positions


def slope_at(loss: Callable[[Tensor], Tensor], point: Tensor, index: tuple[int, int], step: float = 1e-2) -> float:
    """The slope of a loss along one element, by central differences."""
    ahead, behind = point.clone(), point.clone()
    ahead[index] += step
    behind[index] -= step
    return ((loss(ahead) - loss(behind)) / (2 * step)).item()


def bucketed_by_definition(student: Tensor, teacher: Tensor, k: int, temperature: float) -> Tensor:
    """The KL of the two distributions after all tokens beyond the teacher's top k are poured into one."""
    p, q = (teacher / temperature).double().softmax(-1), (student / temperature).double().softmax(-1)
    ids = teacher.topk(k, dim=-1).indices
    rest = torch.ones_like(p).scatter(-1, ids, 0.0)
    p_buckets = torch.cat([p.gather(-1, ids), (p * rest).sum(-1, keepdim=True)], -1)
    q_buckets = torch.cat([q.gather(-1, ids), (q * rest).sum(-1, keepdim=True)], -1)
    return (p_buckets * (p_buckets / q_buckets).log()).sum() * temperature**2 / N


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
def test_with_every_token_stored_it_is_the_kl_of_torch_times_temperature_squared(logits, temperature):
    student, teacher = logits
    reference = F.kl_div(
        (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1), reduction="batchmean"
    )
    assert torch.allclose(kl(student, teacher, k=V, temperature=temperature), reference * temperature**2, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 4, V - 1])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_it_is_the_kl_of_the_bucketed_distributions_and_bounds_the_full_one_from_below(logits, k, temperature):
    student, teacher = logits
    bucketed = kl(student, teacher, k=k, temperature=temperature)
    assert torch.allclose(bucketed.double(), bucketed_by_definition(student, teacher, k, temperature), rtol=1e-5)
    assert 0 < bucketed <= kl(student, teacher, k=V, temperature=temperature) + 1e-6


@pytest.mark.parametrize("k", [4, V])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_its_gradient_is_that_of_finite_differences(logits, k, temperature):
    student, teacher = (values[:2, :8].double() for values in logits)
    values, ids, normaliser = stored(teacher, min(k, 8), temperature)

    def loss(x: Tensor) -> Tensor:
        # The function computes in float32; in float64 the same formula is checked through torch's own gradient.
        return bucketed_kl(x, values, ids, normaliser, temperature=temperature, num_positions=2.0)

    point = student.clone().requires_grad_()
    loss(point).backward()
    for index in ((0, 0), (0, 5), (1, 3)):
        slope = slope_at(loss, student, index)
        assert point.grad is not None
        assert math.isclose(point.grad[index].item(), slope, rel_tol=2e-2, abs_tol=2e-4)


@pytest.mark.parametrize("k", [1, 4, V - 1, V])
def test_at_student_equal_to_teacher_loss_and_gradient_are_zero(logits, k):
    _, teacher = logits
    student = teacher.clone().requires_grad_()
    loss = kl(student, teacher, k=k, temperature=2.0)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-6


def test_stored_logits_rounded_up_never_make_it_negative(logits):
    _, teacher = logits
    values, ids, normaliser = stored(10 * teacher, 8, 1.0)
    loss = bucketed_kl(10 * teacher, values + 0.004, ids, normaliser, temperature=1.0, num_positions=N)
    assert -1e-6 < loss < 1e-4  # float32 rounds a KL of zero to either side


def test_a_student_that_is_sure_of_a_stored_token_has_a_finite_gradient(logits):
    _, teacher = logits
    student = torch.zeros_like(teacher).scatter(-1, teacher.argmax(-1, keepdim=True), 80.0).requires_grad_()
    kl(student, teacher, k=4, temperature=1.0).backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().max() <= 1.0


def test_cross_entropy_is_the_sum_of_torchs(logits):
    student, _ = logits
    labels = torch.arange(N)
    assert torch.allclose(cross_entropy(student, labels) / 10.0, F.cross_entropy(student, labels) * N / 10)


def test_the_gradient_of_cross_entropy_is_that_of_finite_differences(logits):
    student, _ = logits
    labels = torch.arange(N)
    point = student.clone().requires_grad_()
    (cross_entropy(point, labels) / N).backward()
    slope = slope_at(lambda x: cross_entropy(x, labels) / N, student, (1, 1))
    assert point.grad is not None
    assert math.isclose(point.grad[1, 1].item(), slope, rel_tol=2e-2, abs_tol=2e-4)


@pytest.mark.parametrize("name", sorted(HIDDEN_LOSSES))
def test_each_hidden_loss_is_zero_at_the_teacher_and_has_the_gradient_of_finite_differences(name):
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(N, D, generator=generator), torch.randn(N, D, generator=generator)

    def loss_of(x: Tensor) -> Tensor:
        return HIDDEN_LOSSES[name](x, teacher).sum() / N

    assert loss_of(teacher).abs() < 1e-6
    point = student.clone().requires_grad_()
    loss_of(point).backward()
    slope = slope_at(loss_of, student, (2, 3))
    assert point.grad is not None
    assert math.isclose(point.grad[2, 3].item(), slope, rel_tol=2e-2, abs_tol=1e-4)


def test_raw_mse_is_ruled_by_a_position_of_huge_norm_and_the_normalised_one_is_not():
    teacher = torch.randn(N, D, generator=torch.Generator().manual_seed(2))
    teacher[0] *= 1000
    student = 0.9 * teacher
    assert hidden_mse(student, teacher).mean() > 1000
    alone = hidden_normalised_mse(student[1:], teacher[1:]).mean()
    assert hidden_normalised_mse(student, teacher).mean() < 2 * alone


def test_mse_is_torchs():
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(N, D, generator=generator), torch.randn(N, D, generator=generator)
    assert torch.allclose(hidden_mse(student, teacher).mean(), F.mse_loss(student, teacher))
