"""Losses over the vocabulary in chunks equal those over all logits at once, in value and in every gradient."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coldstill.pipeline.losses.chunked_loss import chunked_loss
from coldstill.pipeline.models.output_head import OutputHead

N, D, V = 13, 8, 30
WEIGHTS = torch.tensor([0.7, 0.2])
TARGETS = torch.arange(N) % V


@dataclass(frozen=True)
class HeadCase:
    """What an output head does behind its matrix."""

    scale: float = 1.0
    softcap: float | None = None
    bias: bool = False


HEADS = [HeadCase(), HeadCase(scale=0.25), HeadCase(softcap=2.0), HeadCase(scale=2.0, softcap=3.0, bias=True)]
each_head = pytest.mark.parametrize("case", HEADS, ids=str)
# 1, 2, 4, and 13 chunks; the last of several is shorter.
each_chunk_length = pytest.mark.parametrize("chunk_length", [100, 7, 4, 1])


def terms(logits: Tensor, chunk: slice) -> Tensor:
    """Two sums over positions, which differ by position."""
    logits = logits.float()
    targets = TARGETS[chunk]
    place = torch.arange(1, N + 1)[chunk]
    return torch.stack(
        [F.cross_entropy(logits, targets, reduction="sum"), (logits.log_softmax(-1).square().mean(-1) * place).sum()]
    )


def inputs(case: HeadCase, *, frozen: bool = False) -> tuple[Tensor, OutputHead]:
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(N, D, generator=generator).requires_grad_()
    weight = torch.randn(V, D, generator=generator).requires_grad_(not frozen)
    bias = torch.randn(V, generator=generator).requires_grad_(not frozen) if case.bias else None
    return state, OutputHead(weight, bias, case.scale, case.softcap)


def dense(state: Tensor, case: HeadCase, head: OutputHead) -> Tensor:
    """The plain way: all logits at once, and torch's own gradient."""
    logits = state @ head.weight_VD.T
    if head.bias_V is not None:
        logits = logits + head.bias_V
    logits = logits * case.scale
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    return terms(logits, slice(0, N))


def leaves(state: Tensor, head: OutputHead) -> dict[str, Tensor]:
    named = {"state": state, "weight": head.weight_VD, "bias": head.bias_V}
    return {name: values for name, values in named.items() if values is not None}


def assert_near(got: Tensor, want: Tensor) -> None:
    """Within a millionth of the largest."""
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()


@each_head
@each_chunk_length
@pytest.mark.parametrize("upstream", [1.0, 2.0])
def test_loss_and_gradients_equal_those_of_all_logits_at_once(case, chunk_length, upstream, chunk_positions):
    chunk_positions(chunk_length)
    state, head = inputs(case)
    assert len(list(head.chunks(N))) == math.ceil(N / chunk_length)
    want_terms = dense(state, case, head)
    want = (want_terms * WEIGHTS).sum()
    (upstream * want).backward()
    gradients = {name: values.grad for name, values in leaves(state, head).items()}
    state, head = inputs(case)
    loss, got_terms = chunked_loss(state, head, terms, WEIGHTS)
    (upstream * loss).backward()
    assert_near(loss.detach(), want.detach())
    for got, each in zip(got_terms, want_terms.detach(), strict=True):
        assert_near(got, each)
    for name, values in leaves(state, head).items():
        assert values.grad is not None, name
        assert_near(values.grad, gradients[name])


@each_chunk_length
def test_a_frozen_head_gets_no_gradient_and_the_state_its_own(chunk_length, chunk_positions):
    chunk_positions(chunk_length)
    case = HEADS[-1]
    state, head = inputs(case, frozen=True)
    loss, _ = chunked_loss(state, head, terms, WEIGHTS)
    loss.backward()
    assert head.weight_VD.grad is None
    assert head.bias_V is not None
    assert head.bias_V.grad is None
    got = state.grad
    state, head = inputs(case, frozen=True)
    (dense(state, case, head) * WEIGHTS).sum().backward()
    assert_near(got, state.grad)


def test_a_head_is_trained_below_a_frozen_body(chunk_positions):
    chunk_positions(4)
    case = HEADS[-1]
    state, head = inputs(case)
    (dense(state, case, head) * WEIGHTS).sum().backward()
    want = head.weight_VD.grad
    state, head = inputs(case)
    loss, _ = chunked_loss(state.detach(), head, terms, WEIGHTS)
    loss.backward()
    assert_near(head.weight_VD.grad, want)
    assert state.grad is None


@each_chunk_length
def test_where_no_gradient_is_wanted_there_is_none(chunk_length, chunk_positions):
    chunk_positions(chunk_length)
    state, head = inputs(HEADS[0])
    want, _ = chunked_loss(state, head, terms, WEIGHTS)
    with torch.no_grad():
        loss, got_terms = chunked_loss(state, head, terms, WEIGHTS)
    assert torch.equal(loss, want)
    assert not loss.requires_grad
    assert not got_terms.requires_grad
    assert state.grad is None
    assert head.weight_VD.grad is None
    with torch.inference_mode():
        assert torch.equal(chunked_loss(state, head, terms, WEIGHTS)[0], want)


def test_the_terms_carry_no_gradient(chunk_positions):
    chunk_positions(4)
    loss, got_terms = chunked_loss(*inputs(HEADS[0]), terms, WEIGHTS)
    assert loss.requires_grad
    assert not got_terms.requires_grad
    assert torch.allclose(loss, (got_terms * WEIGHTS).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_several_chunks_give_the_gradients_of_one(dtype, chunk_positions):
    """Of a body that autocast ran in bfloat16 too: gradients have the dtype of what they are of."""
    found = []
    for chunk_length in (100, 4):
        chunk_positions(chunk_length)
        state, head = inputs(HEADS[0])
        given = state.to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _ = chunked_loss(given, head, terms, WEIGHTS)
        loss.backward()
        assert state.grad is not None
        assert head.weight_VD.grad is not None
        assert head.weight_VD.grad.dtype == torch.float32
        found.append((loss.detach(), state.grad, head.weight_VD.grad))
    for one, several in zip(*found, strict=True):
        assert torch.allclose(one, several, rtol=2e-2, atol=2e-2 * one.abs().max().item())
    state, head = inputs(HEADS[0])
    (dense(state, HEADS[0], head) * WEIGHTS).sum().backward()
    for got, want in zip(found[1][1:], (state.grad, head.weight_VD.grad), strict=True):
        assert F.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.999


def test_no_positions_are_a_loss_of_zero():
    state, head = inputs(HEADS[0])
    loss, got_terms = chunked_loss(state[:0], head, terms, WEIGHTS)
    assert loss == 0
    assert got_terms.tolist() == [0.0, 0.0]
    loss.backward()
    assert state.grad is not None
    assert not state.grad.any()


def test_a_second_backward_is_refused_rather_than_wrong():
    state, head = inputs(HEADS[0])
    loss, _ = chunked_loss(state, head, terms, WEIGHTS)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be used once"):
        loss.backward()


def test_tied_weights_gather_the_gradient_of_both_uses(chunk_positions):
    """As in models whose head is their embedding: what flows through the state adds to what flows through the head."""
    chunk_positions(4)
    ids = torch.arange(N) % V

    def run(*, chunked: bool) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(3)
        weight = torch.randn(V, D, generator=generator).requires_grad_()
        state = torch.tanh(F.embedding(ids, weight))
        head = OutputHead(weight)
        loss = (
            chunked_loss(state, head, terms, WEIGHTS)[0] if chunked else (dense(state, HEADS[0], head) * WEIGHTS).sum()
        )
        loss.backward()
        assert weight.grad is not None
        return loss.detach(), weight.grad

    for got, want in zip(run(chunked=True), run(chunked=False), strict=True):
        assert_near(got, want)


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_in_float16_has_gradients_of_a_mean_over_many_positions(bias: bool, chunk_positions):
    """Each is far below float16's range before it is brought to about 1; what is kept has the weights' dtype."""
    chunk_positions(4)
    state, head = inputs(HeadCase(bias=bias))
    half = OutputHead(
        head.weight_VD.detach().half().requires_grad_(), None if not bias else head.bias_V.detach().half()
    )
    weights = WEIGHTS * 1e-3
    loss, _ = chunked_loss(state, half, terms, weights)
    got = torch.autograd.grad(loss, [state, half.weight_VD])
    (dense(state, HeadCase(bias=bias), head) * weights).sum().backward()
    for one, other in zip(got, (state.grad, head.weight_VD.grad), strict=True):
        assert F.cosine_similarity(one.float().flatten(), other.flatten(), dim=0) > 0.999
        assert one.float().norm().item() == pytest.approx(other.norm().item(), rel=0.02)
