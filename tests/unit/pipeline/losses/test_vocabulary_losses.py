"""The few passes over a chunk's logits give what torch gives of the definitions, in every number and every gradient."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coldstill.pipeline.losses.divergences import Divergence
from coldstill.pipeline.losses.logits import Logits
from coldstill.pipeline.losses.logits_statistics import LogitsStatistics, Sought, logits_statistics
from coldstill.pipeline.losses.logits_targets import BucketedTopk, FullDistribution, LogitsTarget, SampledTail
from coldstill.pipeline.losses.student_logits import StudentEvents
from coldstill.pipeline.losses.task import Task
from coldstill.pipeline.losses.term import Predictions
from coldstill.pipeline.losses.vocabulary_losses import chunk_losses, vocabulary_loss
from coldstill.pipeline.models.output_head import OutputHead, PlainLogits

C, V, K = 9, 50, 6
TEMPERATURES = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0]
KL = Logits(1.0, Divergence("forward_kl"))
AT = [(1.0,), (3.0,), *((t, 1.0) for t in TEMPERATURES if t != 1.0), (1.0, 2.0), (4.0, 2.0, 1.0)]


def random(*shape: int, seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LABELS = torch.randint(V, (C,), generator=torch.Generator().manual_seed(5))


def rest_of(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.scatter(-1, ids, -torch.inf).logsumexp(-1)


@pytest.fixture(params=[1, 2, 4, 100])
def rows_of_a_block(request, monkeypatch) -> None:
    """The last block is shorter for some."""
    monkeypatch.setattr("coldstill.pipeline.models.row_blocks.BLOCK_BYTES", 4 * V * request.param)


@pytest.mark.usefixtures("rows_of_a_block")
@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize("temperatures", AT, ids=str)
def test_every_statistic_and_its_gradient_are_torchs(temperatures: tuple[float, ...], with_teacher: bool):
    logits = random(C, V, seed=0).requires_grad_()
    teacher = random(C, V, seed=1)
    ids = torch.cat([LABELS.unsqueeze(1), random(C, V, seed=2).topk(K).indices], dim=1)
    first = temperatures[0]
    want = {
        "logits_CG": logits.gather(-1, ids),
        "normaliser_CR": torch.stack([(logits / t).logsumexp(-1) for t in temperatures], dim=-1),
    }
    if with_teacher:
        log_q, log_p = (logits / first).log_softmax(-1), (teacher / first).log_softmax(-1)
        want["kl_C"] = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    else:
        want["rest_C"] = rest_of(logits / first, ids[:, -K:])

    def taken() -> LogitsStatistics:
        """With a graph of its own, which can be used once."""
        sought = Sought(ids, temperatures, 0, teacher.clone()) if with_teacher else Sought(ids, temperatures, K)
        return logits_statistics(logits, sought)

    for chosen in [*([name] for name in want), list(want)]:
        # A weight of its own for each number, so that none can stand for another.
        weights = {name: random(*want[name].shape, seed=7) for name in chosen}
        statistics = taken()
        for name in chosen:
            torch.testing.assert_close(getattr(statistics, name), want[name], rtol=1e-5, atol=1e-5)
        got = sum((getattr(statistics, name) * weights[name]).sum() for name in chosen)
        expected = sum((want[name] * weights[name]).sum() for name in chosen)
        (gradient,) = torch.autograd.grad(got, logits)
        torch.testing.assert_close(
            gradient, torch.autograd.grad(expected, logits, retain_graph=True)[0], rtol=1e-4, atol=5e-6
        )


def targets(temperature: float) -> dict[str, LogitsTarget]:
    teacher = random(C, V, seed=1)
    top, normaliser = teacher.topk(K), (teacher / temperature).logsumexp(-1)
    drawn = torch.randint(V, (C, 4), generator=torch.Generator().manual_seed(3))
    drawn[:, 1] = drawn[:, 0]  # a draw may stand twice
    return {
        "bucketed": BucketedTopk(top.values, top.indices, normaliser, temperature, V),
        "everything": BucketedTopk(*teacher.topk(V), normaliser, temperature, V),
        "sampled": SampledTail(
            torch.cat([top.values, teacher.gather(-1, drawn)], -1),
            torch.cat([top.indices, drawn], -1),
            torch.rand(C, K + 4, generator=torch.Generator().manual_seed(4)),
            normaliser,
            K,
            temperature,
        ),
        "full": FullDistribution(teacher, OutputHead(torch.eye(V)), temperature, random(V, seed=8, scale=0.2)),
    }


def by_torch(logits: Tensor, target: LogitsTarget, divergence: Divergence) -> Tensor:
    """The divergence at each position from torch's own operations, one after another."""
    everywhere = slice(0, C)
    request = target.request(everywhere, of_forward_kl=False)
    if request is None:
        return divergence(target.events(everywhere, StudentEvents(logits)))
    divided = logits / target.temperature
    rest = rest_of(divided, request.ids_CE) if request.has_rest else None
    student = StudentEvents(logits.gather(-1, request.ids_CE), divided.logsumexp(-1), rest)
    return divergence(target.events(everywhere, student))


def losses_of(logits: Tensor, target: LogitsTarget | None, *terms: Task | Logits) -> list[Tensor]:
    """The sums of some terms over all positions, beside a target."""
    return chunk_losses(terms, Predictions(LABELS[: len(logits)], target), slice(0, len(logits)), logits)


@pytest.mark.parametrize(
    ("kind", "temperature"), list(itertools.product(["bucketed", "everything", "sampled", "full"], TEMPERATURES))
)
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon", "total_variation"])
def test_both_losses_and_their_gradient_are_torchs(kind: str, temperature: float, name: str):
    target, divergence = targets(temperature)[kind], Divergence(name)
    logits = random(C, V, seed=0).requires_grad_()
    task, logits_loss = losses_of(logits, target, Task(1.0), Logits(1.0, divergence))
    (got,) = torch.autograd.grad(0.7 * task + 1.3 * logits_loss, logits)
    want_task = F.cross_entropy(logits, LABELS, reduction="sum")
    want_loss = by_torch(logits, target, divergence).sum()
    assert task.item() == pytest.approx(want_task.item(), rel=1e-5)
    assert logits_loss.item() == pytest.approx(want_loss.item(), rel=2e-5, abs=1e-5)
    (want,) = torch.autograd.grad(0.7 * want_task + 1.3 * want_loss, logits)
    torch.testing.assert_close(got, want, rtol=2e-4, atol=5e-6)


@pytest.mark.parametrize("kind", ["bucketed", "sampled", "full"])
def test_each_loss_stands_alone(kind: str):
    target = targets(2.0)[kind]
    logits = random(C, V, seed=0)
    both = losses_of(logits, target, Task(1.0), KL)
    (task,) = losses_of(logits, None, Task(1.0))
    (alone,) = losses_of(logits, target, KL)
    torch.testing.assert_close(torch.stack([task, alone]), torch.stack(both), rtol=1e-6, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(shift=st.floats(-1e4, 1e4), scale=st.floats(0.01, 60.0), temperature=st.sampled_from(TEMPERATURES))
def test_any_level_and_scale_of_logits_give_finite_losses_and_gradients(shift, scale, temperature):
    logits = (random(C, V, seed=0, scale=scale) + shift).requires_grad_()
    for target in targets(temperature).values():
        losses = losses_of(logits, target, Task(1.0), KL)
        (gradient,) = torch.autograd.grad(sum(losses), logits)
        assert all(torch.isfinite(loss) for loss in losses)
        assert torch.isfinite(gradient).all()


def test_a_rest_that_underflows_keeps_the_loss_finite_and_pulls_the_sure_token_down():
    teacher = torch.zeros(1, V)
    top = teacher.topk(1)
    target = BucketedTopk(top.values, top.indices, teacher.logsumexp(-1), 1.0, V)
    logits = torch.full((1, V), -300.0)
    logits[0, top.indices[0, 0]] = 300.0
    logits.requires_grad_()
    (loss,) = losses_of(logits, target, KL)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert 50 < loss.item() < 1e3
    assert gradient[0, top.indices[0, 0]].item() == pytest.approx(1 - 1 / V, rel=1e-4)


def test_equal_distributions_have_no_divergence_to_the_last_digits():
    """Each token's difference is taken before the sum: what cancels is small."""
    teacher = random(C, V, seed=1) + 50.0
    target = FullDistribution(teacher, OutputHead(torch.eye(V)), 2.0)
    (loss,) = losses_of(teacher.clone(), target, KL)
    assert abs(loss.item()) < 1e-5


WEIGHTS = torch.tensor([0.3, 1.0, 0.7, 0.0, 2.0, 0.1, 1.0, 0.5, 0.9])


def whole_loss(
    logits: Tensor, target: LogitsTarget, divergence: Divergence, weights: Tensor | None
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, terms and gradient by the shared pass, over the positions' mean."""
    leaf = logits.clone().requires_grad_()
    num_positions = C if weights is None else weights.sum()
    loss, terms = vocabulary_loss(
        [Task(0.7), Logits(1.3, divergence)],
        Predictions(LABELS, target, weights),
        state_ND=leaf,
        head=PlainLogits(V),
        num_positions=num_positions,
    )
    return loss.detach(), terms, torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "selective"])
@pytest.mark.parametrize("kind", ["bucketed", "everything", "sampled", "full"])
def test_a_positions_share_of_each_term_is_its_weight(kind: str, name: str):
    """Against autograd over all logits at once, position by position."""
    target, divergence = targets(2.0)[kind], Divergence(name)
    logits = random(C, V, seed=0)
    loss, terms, gradient = whole_loss(logits, target, divergence, WEIGHTS)
    leaf = logits.clone().requires_grad_()
    share = WEIGHTS / WEIGHTS.sum()
    want = {
        "loss_task": (F.cross_entropy(leaf, LABELS, reduction="none") * share).sum(),
        "loss_logits": 4.0 * (by_torch(leaf, target, divergence) * share).sum(),
    }
    for term, value in want.items():
        assert terms[term].item() == pytest.approx(value.item(), rel=2e-5), term
    whole = 0.7 * want["loss_task"] + 1.3 * want["loss_logits"]
    assert loss.item() == pytest.approx(whole.item(), rel=2e-5)
    (want_gradient,) = torch.autograd.grad(whole, leaf)
    torch.testing.assert_close(gradient, want_gradient, rtol=2e-4, atol=1e-6)
    assert not gradient[3].any(), "of a position that weighs nothing"
    assert gradient[4].any()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("kind", ["bucketed", "sampled", "full"])
def test_weights_that_are_all_one_change_no_digit(kind: str, name: str):
    target, divergence = targets(2.0)[kind], Divergence(name)
    logits = random(C, V, seed=0)
    (loss, terms, gradient), (other, other_terms, other_gradient) = (
        whole_loss(logits, target, divergence, weights) for weights in (None, torch.ones(C))
    )
    assert torch.equal(loss, other)
    assert terms == other_terms
    assert torch.equal(gradient, other_gradient)
