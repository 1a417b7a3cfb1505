"""A code holds every coefficient to half a step, and its metric is what the distributions lose by an error."""

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coldstill.pipeline.models.output_head import OutputHead
from coldstill.pipeline.targets.fisher_information import fisher_information
from coldstill.pipeline.targets.transform_coding import (
    DigitClass,
    TransformCode,
    code_arrays,
    decode_coefficients,
    encode_coefficients,
    fit_code,
    logit_correction,
)

N, D, V = 300, 24, 40
# From a hundredth of a step to a hundred: coefficients of every class.
SPREADS = torch.logspace(2, -2, D)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_code(spread_D: Tensor) -> TransformCode:
    """Coefficients are the states themselves."""
    width = len(spread_D)
    return TransformCode(torch.zeros(width), torch.eye(width), torch.eye(width), spread_D)


@pytest.fixture
def states() -> Tensor:
    """Channels of many scales, mixed by a rotation."""
    rotation = torch.linalg.qr(random(D, D, seed=1)).Q
    return ((random(N, D) * SPREADS.double()) @ rotation + random(D, seed=2)).float()


@pytest.fixture
def metric() -> Tensor:
    root = random(D, D, seed=3)
    return root @ root.T / D + torch.eye(D)


@pytest.mark.parametrize("step", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("weighed", [False, True], ids=["identity", "metric"])
def test_every_coefficient_comes_back_within_half_a_step(states, metric, step, weighed):
    code = fit_code(states, metric if weighed else None)
    arrays = encode_coefficients(states, code, step)
    decoded = decode_coefficients(arrays, code, step)
    error = (decoded.double() - states.double()) @ code.analysis_DD.double()
    assert error.abs().max() <= 0.5 * step + 1e-3
    assert error.abs().max() > 0.4 * step
    for name, spec in code_arrays(code, step).items():
        assert str(arrays[name].dtype) == f"torch.{spec.dtype}"
        assert tuple(arrays[name].shape) == spec.full_shape(num_tokens=N, num_rows=1)
    assert arrays.keys() == code_arrays(code, step).keys()


@pytest.mark.parametrize("distance", [1e2, 1e4])
def test_what_lies_far_outside_the_calibration_is_not_clipped(distance):
    code = plain_code(SPREADS)
    states = (distance * random(N, D)).float()
    arrays = encode_coefficients(states, code, 1.0)
    assert arrays["overflow"].any(dim=0).sum() > D / 2
    assert torch.equal(decode_coefficients(arrays, code, 1.0), states.round())


def test_values_like_the_calibration_hardly_ever_overflow(states):
    code = fit_code(states)
    fresh = (random(4000, D, seed=7) * code.spread_D.double()) @ code.synthesis_DD.double() + code.centre_D.double()
    overflow = encode_coefficients(fresh.float(), code, 4.0)["overflow"]
    assert (overflow != 0).double().mean() < 1e-2


def test_a_coefficient_beyond_the_overflow_is_refused_with_its_size():
    code = plain_code(torch.ones(D))
    far = torch.zeros(2, D)
    far[1, 3] = 32767 * 15
    assert torch.equal(decode_coefficients(encode_coefficients(far, code, 1.0), code, 1.0), far)
    far[1, 3] *= -2
    with pytest.raises(OverflowError, match=r"^a coefficient of 9\.83e\+05 is too many steps of 1$"):
        encode_coefficients(far, code, 1.0)


def test_the_layout_covers_each_coefficient_once_in_classes_that_hold_its_spread():
    spreads = torch.logspace(2, -2, 97)
    layout = plain_code(spreads).layout(1.0)
    assert [part.begin for part in layout] == [0, *(part.end for part in layout[:-1])]
    assert layout[-1].end == len(spreads)
    assert [(part.base, part.per_byte) for part in layout] == [(255, 1), (255, 1), (255, 1), (15, 2), (5, 3), (3, 5)]
    assert len({part.array for part in layout}) == len(layout)
    for part in layout[1:]:
        assert spreads[part.begin] * 4 <= part.base // 2 * 4 + 4
        assert part.base**part.per_byte <= 256
    for lowest, part in zip((8, 4, 1.5, 0.5, 0.3), layout, strict=False):
        assert spreads[part.end - 1] > lowest >= spreads[part.end]


@given(
    st.lists(st.floats(0.01, 100.0), min_size=1, max_size=40),
    st.sampled_from([0.01, 0.3, 1.0, 7.0]),
)
@settings(max_examples=50, deadline=None)
def test_the_layout_is_a_function_of_the_spreads_alone(spreads, step):
    spread_D = torch.tensor(sorted(spreads, reverse=True))
    code = plain_code(spread_D)
    other = dataclasses.replace(code, centre_D=code.centre_D + 1, analysis_DD=2 * code.analysis_DD)
    assert code.layout(step) == other.layout(step)
    assert code.layout(step) == dataclasses.replace(code, spread_D=2 * spread_D).layout(2 * step), "in units of steps"
    covered = [index for part in code.layout(step) for index in range(part.begin, part.end)]
    assert covered == list(range(len(spreads)))


@given(st.sampled_from([(255, 1), (15, 2), (5, 3), (3, 5)]), st.integers(1, 23), st.integers(0, 5), st.data())
@settings(max_examples=80, deadline=None)
def test_digits_come_back_from_their_bytes(kind, count, begin, data):
    base, per_byte = kind
    part = DigitClass("digits", begin, begin + count, base, per_byte)
    reach = base // 2
    digit = st.integers(-reach, reach)
    digits = torch.tensor(data.draw(st.lists(st.lists(digit, min_size=count, max_size=count), min_size=1, max_size=3)))
    packed = part.pack(digits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (len(digits), math.ceil(count / per_byte))
    assert torch.equal(part.unpack(packed), digits.float())
    assert torch.equal(part.unpack(packed.unsqueeze(0)), digits.float().unsqueeze(0))


def test_the_first_digit_of_a_byte_is_the_lowest():
    part = DigitClass("digits", 0, 3, 5, 3)
    assert part.pack(torch.tensor([[-1, 2, 0]])).tolist() == [[1 + 5 * 4 + 25 * 2]]


def test_a_code_sorts_by_spread_and_its_two_maps_are_inverse(states, metric):
    code = fit_code(states, metric)
    assert (code.spread_D.diff() <= 0).all()
    identity = code.analysis_DD.double() @ code.synthesis_DD.double()
    assert torch.allclose(identity, torch.eye(D, dtype=torch.float64), atol=1e-5)
    coefficients = (states.double() - code.centre_D.double()) @ code.analysis_DD.double()
    covariance = coefficients.T @ coefficients / N
    assert torch.allclose(covariance, torch.diag(code.spread_D.double().square()), rtol=1e-3, atol=1e-3)


def test_the_same_error_in_any_coefficient_costs_the_same_under_the_metric(states, metric):
    synthesis = fit_code(states, metric).synthesis_DD.double()
    assert torch.allclose(synthesis @ metric @ synthesis.T, torch.eye(D, dtype=torch.float64), atol=1e-5)


@dataclass(frozen=True)
class HeadCase:
    """What an output head does behind its matrix."""

    scale: float = 1.0
    softcap: float | None = None
    bias: bool = False

    def head(self) -> OutputHead:
        bias_V = random(V, seed=5).float() if self.bias else None
        return OutputHead((random(V, D, seed=4) / math.sqrt(D)).float(), bias_V, self.scale, self.softcap)


HEADS = [HeadCase(), HeadCase(scale=0.25), HeadCase(softcap=3.0), HeadCase(scale=2.0, softcap=5.0, bias=True)]


def logits_of(head: OutputHead, state: Tensor) -> Tensor:
    """The head in float64, for one state."""
    logits = head.weight_VD.double() @ state + (0 if head.bias_V is None else head.bias_V.double())
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def fisher_by_definition(head: OutputHead, states: Tensor) -> Tensor:
    """0.7 at temperature 1 and 0.3 at 2 of the mean over states of J' (diag p - p p') J."""
    total = torch.zeros(D, D, dtype=torch.float64)
    for state in states.double():
        jacobian = torch.autograd.functional.jacobian(lambda x: logits_of(head, x), state)
        for temperature, weight in ((1.0, 0.7), (2.0, 0.3)):
            p = (logits_of(head, state) / temperature).softmax(-1)
            total += weight * jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    return total / len(states)


@pytest.mark.parametrize("case", HEADS, ids=str)
@pytest.mark.parametrize("words_a_chunk", [100, 7])
def test_the_fisher_information_is_the_mean_of_its_definition(case, words_a_chunk, chunk_positions):
    chunk_positions(words_a_chunk)
    head, states = case.head(), (3 * random(5, D, seed=6)).float()
    want = fisher_by_definition(head, states)
    got = fisher_information(states, head).double()
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def test_the_fisher_information_tells_how_many_words_are_done_with(chunk_positions):
    chunk_positions(7)
    told: list[int] = []
    fisher_information(random(5, D, seed=6).float(), HeadCase().head(), on_words=told.append)
    assert told == 2 * [7, 7, 7, 7, 7, 5]


def test_the_metric_of_a_head_in_half_precision_is_that_of_its_weights_in_float32():
    head, states = HeadCase(bias=True).head().detached(torch.bfloat16), (3 * random(5, D, seed=6)).to(torch.bfloat16)
    want = fisher_by_definition(head, states)
    assert torch.allclose(fisher_information(states, head), want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("case", HEADS, ids=str)
def test_the_kl_of_rebuilt_states_is_half_the_squared_error_under_the_metric(case):
    """Of one state, T^2 KL(T) weighted as the temperatures are: exact as the error goes to zero."""
    head, state = case.head(), (2 * random(1, D, seed=8)).float()
    metric = fisher_information(state, head).double()
    error = 1e-3 * random(D, seed=9)
    total = 0.0
    for temperature, weight in ((1.0, 0.7), (2.0, 0.3)):
        log_p, log_q = (
            (logits_of(head, x) / temperature).log_softmax(-1) for x in (state[0].double(), state[0] + error)
        )
        total += weight * temperature**2 * (log_p.exp() * (log_p - log_q)).sum().item()
    assert total == pytest.approx(0.5 * (error @ metric @ error).item(), rel=1e-2)


def test_a_code_of_the_heads_metric_keeps_the_kl_below_a_twenty_fourth_of_a_squared_step_a_coefficient():
    head = HeadCase().head()
    states = (2 * random(400, D, seed=10)).float()
    code, step = fit_code(states, fisher_information(states, head)), 0.1
    decoded = decode_coefficients(encode_coefficients(states, code, step), code, step)
    log_p, log_q = (head(each).double().log_softmax(-1) for each in (states, decoded))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    # The metric is a mean over states and temperatures: for one temperature the bound holds to some tens of percent.
    assert 0 < kl < 1.5 * D * step**2 / 24


@dataclass(frozen=True)
class Rounded:
    """How wide coefficients are, in steps, and how far each logit reaches."""

    name: str
    spread: float
    reach: float


ROUNDED = [
    Rounded("to zero, nearly all", 0.2, 2.0),
    Rounded("coarse", 0.3, 1.0),
    Rounded("fair", 1.0, 0.6),
    Rounded("fine", 5.0, 0.2),
]


@pytest.mark.parametrize("case", ROUNDED, ids=lambda case: case.name)
def test_corrected_logits_of_rebuilt_states_keep_the_mean_exponential(case):
    """E[exp(rebuilt + correction)] = E[exp(logit)], which rounding alone shifts by many times the noise."""
    width, step, num_samples = 256, 1.0, 12_000
    code = plain_code(torch.full((width,), case.spread))
    # Each coefficient moves a logit by little, as in a real head: the correction is of second order.
    head = OutputHead(case.reach * random(64, width, seed=11).sign().float() / math.sqrt(width))
    states = (case.spread * random(num_samples, width, seed=12)).float()
    rebuilt = decode_coefficients(encode_coefficients(states, code, step), code, step)
    correction = logit_correction(head, code, step)
    truth, plain = head(states).double(), head(rebuilt).double()

    def shift(changed: Tensor) -> tuple[float, float]:
        """Mean relative difference of the exponentials, and its standard error: the samples are paired."""
        of_sample = ((changed.exp() - truth.exp()) / truth.exp().mean(0)).mean(1)
        return of_sample.mean().item(), of_sample.std().item() / math.sqrt(num_samples)

    corrected, noise = shift(plain + correction)
    uncorrected, _ = shift(plain)
    assert abs(corrected) < 3 * noise
    assert abs(uncorrected) > 8 * noise


def test_the_correction_is_minus_half_the_variance_that_rounding_adds():
    code = plain_code(torch.tensor([5.0, 5.0, 0.0, 0.0]))
    head = OutputHead(torch.tensor([[3.0, 4.0, 100.0, 0.0]]), scale=0.5)
    step = 2.0
    # Spreads of 2.5 steps: a twelfth of a squared step in each coefficient, and nothing where there is no spread.
    assert logit_correction(head, code, step).tolist() == pytest.approx([-0.5 * step**2 / 12 * 0.5**2 * 25], rel=1e-4)
    coarse = logit_correction(head, plain_code(torch.full((4,), 0.1)), 2.0)
    assert coarse.tolist() == pytest.approx([0.5 * 0.1**2 * 0.5**2 * 10025], rel=1e-4), "rounded to zero: less variance"


def test_behind_a_soft_cap_there_is_no_correction():
    head = HeadCase(softcap=3.0).head()
    assert not logit_correction(head, plain_code(SPREADS), 1.0).any()
