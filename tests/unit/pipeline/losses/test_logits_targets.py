"""Each kind decodes what a batch holds of it, at the positions that count, in any cut into chunks."""

import pytest
import torch
from student_events import events_of
from torch import Tensor

from coldstill.pipeline.losses.divergences import Events
from coldstill.pipeline.losses.logits_targets import FullDistribution
from coldstill.pipeline.models.counted import places_of
from coldstill.pipeline.models.output_head import OutputHead
from coldstill.pipeline.targets.encodings import StateForm, encode_state
from coldstill.pipeline.targets.forms import (
    FINAL,
    NORMALISER,
    TAIL,
    TOPK,
    BucketedForm,
    FinalForm,
    LogitsForm,
    SampledForm,
    StoredLogits,
)
from coldstill.pipeline.targets.tail_sampling import draw_tail
from coldstill.pipeline.targets.token_encodings import encode_tail, encode_topk, tail_column, topk_column
from coldstill.pipeline.targets.transform_coding import fit_code, logit_correction

B, T, D, V, K, M = 2, 6, 8, 40, 4, 5
TEMPERATURE = 2.0
COUNTS = torch.tensor([[True] * 5 + [False], [False, True, True, False, False, False]])
NUM_COUNTED = int(COUNTS.sum())
each_kind = pytest.mark.parametrize("kind", ["topk", "sampled", "final", "coded"])


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


HEAD = OutputHead(random(V, D, seed=0), random(V, seed=1))
STATES = random(B * T, D, seed=2)
STUDENT = random(NUM_COUNTED, V, seed=3)


def stored_as(kind: str) -> tuple[LogitsForm, StoredLogits]:
    """The teacher in a store's arrays, [B, T, ...], and how to read them."""
    logits = HEAD(STATES)
    columns: dict[str, dict[str, Tensor]] = {}
    if kind in ("final", "coded"):
        code = fit_code(STATES) if kind == "coded" else None
        form = StateForm("coded", 0.3) if kind == "coded" else StateForm("float32")
        columns[FINAL] = encode_state(STATES, form=form, code=code)
        correction = None if code is None else logit_correction(HEAD, code, 0.3)
        read: LogitsForm = FinalForm(form, HEAD, code, correction)
    else:
        top = logits.topk(2 * K)
        # Twice as many as are read, as a store may hold them that serves several recipes.
        column = topk_column("logits/topk/8/float32", k=2 * K, values="float32", vocab_size=V)
        columns[TOPK] = encode_topk(top.values, top.indices, column=column)
        columns[NORMALISER] = {"values": (logits / TEMPERATURE).logsumexp(-1)}
        read = BucketedForm(K, V)
    if kind == "sampled":
        drawn = draw_tail(
            logits,
            top.indices[:, :K],
            temperatures=(1.0, 2.0),
            num_draws=M,
            uniforms_C=torch.rand(B * T, generator=torch.Generator().manual_seed(4)),
        )
        columns[TAIL] = encode_tail(*drawn, column=tail_column("logits/tail/4_5/1_2", num_draws=M, vocab_size=V))
        read = SampledForm(K)
    batch = {
        role: {name: values.unflatten(0, (B, T)) for name, values in arrays.items()} for role, arrays in columns.items()
    }
    return read, batch


def events_in_chunks(kind: str, length: int) -> Events:
    form, stored = stored_as(kind)
    target = form.read(stored, places_of(COUNTS), TEMPERATURE)
    parts = [
        events_of(target, slice(start, start + length), STUDENT[start : start + length])
        for start in range(0, NUM_COUNTED, length)
    ]
    weights = [part.weights_NE for part in parts if part.weights_NE is not None]
    return Events(
        torch.cat([part.teacher_logprobs_NE for part in parts]),
        torch.cat([part.student_logprobs_NE for part in parts]),
        torch.cat(weights) if weights else None,
        parts[0].num_tokens,
    )


@each_kind
def test_the_teacher_stands_at_the_positions_that_count(kind):
    events = events_in_chunks(kind, NUM_COUNTED)
    whole = (HEAD(STATES) / TEMPERATURE).log_softmax(-1).unflatten(0, (B, T))[COUNTS]
    got = events.teacher_logprobs_NE
    if kind == "final":
        assert torch.allclose(got, whole, atol=1e-5)
    elif kind == "coded":
        assert 1e-3 < (got - whole).abs().mean() < 0.3
    else:
        assert torch.allclose(got[:, :K], whole.topk(K).values, atol=1e-5)
    if kind == "topk":
        assert torch.allclose(got.exp().sum(-1), torch.ones(NUM_COUNTED), atol=1e-6)
    if kind == "sampled":
        tail = whole.scatter(-1, whole.topk(K).indices, -torch.inf)
        drawn = got[:, K:]
        nearest = (drawn.unsqueeze(-1) - tail.unsqueeze(1)).abs().amin(-1)
        assert nearest.max() <= 0.01 / TEMPERATURE + 1e-5


@each_kind
@pytest.mark.parametrize("length", [1, 3])
def test_chunks_give_what_all_positions_at_once_do(kind, length):
    whole, cut = events_in_chunks(kind, NUM_COUNTED), events_in_chunks(kind, length)
    assert cut.num_tokens == whole.num_tokens
    for name in ("teacher_logprobs_NE", "student_logprobs_NE", "weights_NE"):
        got, want = getattr(cut, name), getattr(whole, name)
        assert (got is None) == (want is None)
        if want is not None:
            assert torch.allclose(got, want, atol=1e-5), name


def test_a_k_of_the_whole_vocabulary_has_no_bucket():
    logits = HEAD(STATES)
    top = logits.topk(V)
    column = topk_column("logits/topk/40/float32", k=V, values="float32", vocab_size=V)
    stored = {
        TOPK: encode_topk(top.values, top.indices, column=column),
        NORMALISER: {"values": (logits / TEMPERATURE).logsumexp(-1)},
    }
    batch = {
        role: {name: each.unflatten(0, (B, T)) for name, each in arrays.items()} for role, arrays in stored.items()
    }
    events = events_of(BucketedForm(V, V).read(batch, places_of(COUNTS), TEMPERATURE), slice(0, NUM_COUNTED), STUDENT)
    assert events.teacher_logprobs_NE.shape == (NUM_COUNTED, V)
    assert torch.allclose(events.student_logprobs_NE.exp().sum(-1), torch.ones(NUM_COUNTED), atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_the_correction_is_divided_by_the_temperature_squared(temperature):
    correction = random(V, seed=5)
    got = FullDistribution(STATES, HEAD, temperature, correction).logprobs(slice(2, 5))
    want = (HEAD(STATES[2:5]) / temperature + correction / temperature**2).log_softmax(-1)
    assert torch.allclose(got, want, atol=1e-6)


def test_a_form_on_its_own_device_is_itself():
    form = FinalForm(StateForm("float32"), HEAD)
    assert form.on(torch.device("cpu"), torch.float32) is form


def test_a_form_is_brought_to_another_device_once_with_all_that_it_holds():
    code = fit_code(STATES)
    form = FinalForm(StateForm("coded", 0.3), HEAD, code, logit_correction(HEAD, code, 0.3))
    other = form.on(torch.device("meta"), torch.float32)
    assert form.on(torch.device("meta"), torch.float32) is other
    half = form.on(torch.device("cpu"), torch.bfloat16)
    assert half.head.weight_VD.dtype == torch.bfloat16
    assert half.correction_V is not None
    assert half.correction_V.dtype == torch.float32
    assert other.code is not None
    assert other.correction_V is not None
    assert other.head.bias_V is not None
    held = (other.head.weight_VD, other.head.bias_V, other.correction_V, other.code.analysis_DD, other.code.spread_D)
    assert all(values.device.type == "meta" for values in held)
    assert form.head.weight_VD.device.type == "cpu"
