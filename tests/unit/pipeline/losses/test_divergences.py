"""Each divergence is its definition over complete events, and without bias over draws: in value and in gradient."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from student_events import events_of
from torch import Tensor

from coldstill.pipeline.losses.divergences import DIVERGENCES, Divergence, Events
from coldstill.pipeline.losses.logits_targets import BucketedTopk, FullDistribution, LogitsTarget, SampledTail
from coldstill.pipeline.models.output_head import OutputHead
from coldstill.pipeline.targets.tail_sampling import draw_tail

N, V, K, M = 5, 40, 4, 6
ALL = slice(0, None)
TEMPERATURES = (1.0, 2.0, 4.0)
CASES = [
    *(Divergence(name) for name in DIVERGENCES),
    Divergence("jensen_shannon", 0.1),
    Divergence("skewed_kl", 0.7),
    Divergence("bidirectional", 0.9),
]
UNBIASED = [case for case in CASES if case.name != "selective"]
DEFAULTS = {"jensen_shannon": 0.5, "skewed_kl": 0.1, "bidirectional": 0.5}


def id_of(case: Divergence) -> str:
    return case.name if case.weight is None else f"{case.name} {case.weight:g}"


each_divergence = pytest.mark.parametrize("divergence", CASES, ids=id_of)
each_temperature = pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
each_kind = pytest.mark.parametrize("kind", ["full", "bucketed", "sampled"])


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    """Of a student and a teacher."""
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randn(N, V, generator=generator), 2 * torch.randn(N, V, generator=generator)


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a.log() - b.log())).sum(-1)


def by_definition(case: Divergence, p: Tensor, q: Tensor) -> Tensor:
    """The textbook's, of two distributions in float64."""
    weight = DEFAULTS.get(case.name, 0.0) if case.weight is None else case.weight
    mixture = weight * p + (1 - weight) * q
    if case.name == "forward_kl":
        return kl(p, q)
    if case.name == "reverse_kl":
        return kl(q, p)
    if case.name == "jensen_shannon":
        return weight * kl(p, mixture) + (1 - weight) * kl(q, mixture)
    if case.name == "skewed_kl":
        return kl(p, mixture)
    if case.name == "bidirectional":
        return weight * kl(p, q) + (1 - weight) * kl(q, p)
    if case.name == "total_variation":
        return (p - q).abs().sum(-1) / 2
    top = p.topk(min(case.selective_k, p.shape[-1])).indices
    p_top, q_top = p.gather(-1, top), q.gather(-1, top)
    entropy = -(p * p.log()).sum(-1)
    return (kl(p_top, q_top) - p_top.sum(-1) + q_top.sum(-1)) * (entropy > case.selective_entropy)


def target_of(kind: str, teacher: Tensor, temperature: float = 1.0, uniforms: Tensor | float = 0.4) -> LogitsTarget:
    """The teacher as each kind has it: `full` by an output head that gives its states as logits."""
    normaliser = (teacher / temperature).logsumexp(-1)
    top = teacher.topk(K, dim=-1)
    if kind == "full":
        return FullDistribution(teacher, OutputHead(torch.eye(teacher.shape[-1], dtype=teacher.dtype)), temperature)
    if kind == "bucketed":
        return BucketedTopk(top.values, top.indices, normaliser, temperature, teacher.shape[-1])
    uniforms = torch.as_tensor(uniforms).expand(len(teacher))
    drawn, ids, log_weights = draw_tail(
        teacher, top.indices, temperatures=TEMPERATURES, num_draws=M, uniforms_C=uniforms
    )
    return SampledTail(
        logits_NE=torch.cat([top.values, drawn], -1),
        ids_NE=torch.cat([top.indices, ids], -1),
        weights_NE=torch.cat([torch.ones_like(top.values), log_weights.exp()], -1),
        log_normaliser_N=normaliser,
        num_tokens=K,
        temperature=temperature,
    )


def poured(logits: Tensor, top_ids: Tensor, temperature: float) -> Tensor:
    """The distribution in float64 after all tokens but some are poured into one."""
    p = (logits / temperature).double().softmax(-1)
    rest = torch.ones_like(p).scatter(-1, top_ids, 0.0)
    return torch.cat([p.gather(-1, top_ids), (p * rest).sum(-1, keepdim=True)], -1)


@each_divergence
@each_temperature
def test_over_every_token_it_is_its_definition(logits, divergence, temperature):
    student, teacher = logits
    events = events_of(target_of("full", teacher, temperature), ALL, student)
    p, q = ((values / temperature).double().softmax(-1) for values in (teacher, student))
    want = by_definition(divergence, p, q)
    assert want.min() > 0.001
    assert torch.allclose(divergence(events).double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", UNBIASED, ids=id_of)
@each_temperature
def test_over_a_bucket_it_is_that_of_the_poured_distributions(logits, divergence, temperature):
    student, teacher = logits
    events = events_of(target_of("bucketed", teacher, temperature), ALL, student)
    top_ids = teacher.topk(K).indices
    want = by_definition(divergence, *(poured(values, top_ids, temperature) for values in (teacher, student)))
    assert torch.allclose(divergence(events).double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", UNBIASED, ids=id_of)
@each_temperature
def test_over_draws_loss_and_gradient_are_the_whole_vocabularys_in_the_mean(logits, cells, divergence, temperature):
    for student, teacher in zip(*logits, strict=True):
        uniforms, probabilities = cells(teacher, k=K, temperatures=TEMPERATURES, num_draws=M)
        assert len(uniforms) > V / 2
        target = target_of("sampled", teacher.expand(len(uniforms), V), temperature, uniforms)
        point = student.clone().requires_grad_()
        losses = divergence(events_of(target, ALL, point.expand(len(uniforms), V)))
        assert losses.min() >= 0
        (losses * probabilities).sum().backward()
        exact = student.double().requires_grad_()
        want = by_definition(
            divergence, (teacher.double() / temperature).softmax(-1), (exact / temperature).softmax(-1)
        )
        want.backward()
        assert point.grad is not None
        assert exact.grad is not None
        assert (losses.double() @ probabilities).item() == pytest.approx(want.item(), rel=1e-5)
        largest = exact.grad.abs().max().item()
        assert torch.allclose(point.grad.double(), exact.grad, rtol=0, atol=1e-5 * largest)


@each_divergence
@each_kind
@each_temperature
def test_at_student_equal_to_teacher_loss_and_gradient_are_zero(logits, divergence, kind, temperature):
    _, teacher = logits
    for uniform in (0.0, 0.3, 0.99):
        point = teacher.clone().requires_grad_()
        loss = divergence(events_of(target_of(kind, teacher, temperature, uniform), ALL, point))
        assert loss.abs().max() < 1e-6
        loss.sum().backward()
        assert point.grad is not None
        # |p - q| has no slope where they meet, and a bucket's rounding decides on which side of it they are.
        if divergence.name == "total_variation" and kind == "bucketed":
            assert point.grad.abs().max() <= 0.5 / temperature
        else:
            assert point.grad.abs().max() <= 2e-6


@each_divergence
@each_kind
def test_its_gradient_is_that_of_finite_differences(logits, divergence, kind):
    """In float64, so that differences of a millionth still count."""
    student, teacher = (values[:2].double() for values in logits)
    target = target_of(kind, teacher, 2.0)
    point = student.clone().requires_grad_()
    divergence(events_of(target, ALL, point)).sum().backward()
    assert point.grad is not None
    step = 1e-5
    drawn = teacher[0].argmax().item()
    for index in ((0, drawn), (0, 5), (1, 3), (1, 17)):
        ahead, behind = student.clone(), student.clone()
        ahead[index] += step
        behind[index] -= step
        loss = [divergence(events_of(target, ALL, values)).sum().item() for values in (ahead, behind)]
        slope = (loss[0] - loss[1]) / (2 * step)
        assert point.grad[index].item() == pytest.approx(slope, rel=1e-4, abs=1e-7)


@given(
    st.sampled_from(CASES),
    st.sampled_from(["full", "bucketed", "sampled"]),
    st.sampled_from([0.0, 0.1, 1.0, 10.0, 100.0]),
    st.sampled_from([0.5, 1.0, 4.0]),
    st.integers(0, 1 << 20),
)
@settings(max_examples=150, deadline=None)
def test_it_is_never_negative_and_never_without_an_end(divergence, kind, scale, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    teacher = scale * torch.randn(N, V, generator=generator)
    student = (scale * torch.randn(N, V, generator=generator)).requires_grad_()
    uniform = torch.rand((), generator=generator).item()
    loss = divergence(events_of(target_of(kind, teacher, temperature, uniform), ALL, student))
    assert torch.isfinite(loss).all()
    # float32 rounds the terms of a KL, each as large as what it is of, to either side.
    assert (loss >= -1e-6 * (1 + loss.detach().abs().max())).all()
    loss.sum().backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@each_divergence
@each_kind
def test_near_the_teacher_it_is_not_negative_either(logits, divergence, kind):
    """Where float32 has the least to say: the loss is a thousandth of a millionth."""
    _, teacher = logits
    for seed in range(5):
        noise = 1e-4 * torch.randn(N, V, generator=torch.Generator().manual_seed(seed))
        assert (divergence(events_of(target_of(kind, teacher, 1.0), ALL, teacher + noise)) >= -1e-6).all()


def test_the_defaults_are_what_a_recipe_that_gives_no_weight_means(logits):
    student, teacher = logits
    events = events_of(target_of("full", teacher), ALL, student)
    for name, weight in DEFAULTS.items():
        assert torch.equal(Divergence(name)(events), Divergence(name, weight)(events))


@dataclass(frozen=True)
class Ends:
    """What a divergence becomes at an end of its weight."""

    name: str
    weight: float
    becomes: str


@pytest.mark.parametrize(
    "case",
    [
        Ends("bidirectional", 1 - 1e-6, "forward_kl"),
        Ends("bidirectional", 1e-6, "reverse_kl"),
        Ends("skewed_kl", 1e-6, "forward_kl"),
    ],
    ids=lambda case: f"{case.name} to {case.becomes}",
)
@each_kind
def test_at_the_ends_of_its_weight_it_is_the_plain_one(logits, case, kind):
    student, teacher = logits
    events = events_of(target_of(kind, teacher), ALL, student)
    assert torch.allclose(Divergence(case.name, case.weight)(events), Divergence(case.becomes)(events), rtol=1e-3)


@each_kind
@pytest.mark.parametrize("selective_k", [1, 3])
def test_the_selective_one_looks_at_the_likeliest_tokens_alone(logits, kind, selective_k):
    student, teacher = logits
    divergence = Divergence("selective", selective_k=selective_k)
    events = events_of(target_of(kind, teacher), ALL, student)
    want = by_definition(divergence, teacher.double().softmax(-1), student.double().softmax(-1))
    assert torch.allclose(divergence(events).double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["bucketed", "sampled"])
def test_the_selective_one_never_takes_bucket_or_draw_for_a_likely_token(logits, kind):
    student, teacher = logits
    wide = Divergence("selective", selective_k=K + 3)(events_of(target_of(kind, teacher), ALL, student))
    assert torch.equal(wide, Divergence("selective", selective_k=K)(events_of(target_of(kind, teacher), ALL, student)))


@each_kind
def test_the_selective_one_leaves_out_positions_where_the_teacher_is_sure(kind):
    generator = torch.Generator().manual_seed(1)
    teacher, student = torch.randn(N, V, generator=generator), torch.randn(N, V, generator=generator)
    teacher[1, 3] = teacher[3, 30] = 50.0
    point = student.requires_grad_()
    # Of a bucket the entropy is that of the poured distribution, which is lower.
    threshold = 0.3 if kind == "bucketed" else 1.0
    divergence = Divergence("selective", selective_k=2, selective_entropy=threshold)
    loss = divergence(events_of(target_of(kind, teacher), ALL, point))
    assert (loss > 0).tolist() == [True, False, True, False, True]
    loss.sum().backward()
    assert point.grad is not None
    assert point.grad.any(dim=1).tolist() == [True, False, True, False, True]


def test_probabilities_of_zero_on_one_side_are_finite():
    sure = torch.tensor([[0.0, -torch.inf]])
    even = torch.full((1, 2), math.log(0.5))
    for divergence in CASES:
        for p, q in ((sure, even), (even, sure), (sure, sure)):
            for weights in (None, torch.ones(1, 2)):
                assert torch.isfinite(divergence(Events(p, q, weights))).all()
