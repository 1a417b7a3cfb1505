"""A student whose head is not known gives its logits whole, with one warning, and the same values and gradients."""

import warnings

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from coldstill.pipeline.losses.chunked_loss import chunked_loss
from coldstill.pipeline.models import find_structure, head_problem
from coldstill.pipeline.models.output_head import OutputHead, PlainLogits
from coldstill.pipeline.models.student_forward import StudentForward

IDS = torch.arange(1, 25).reshape(2, 12)


class Squashed(LlamaForCausalLM):
    """A head that squashes its logits in a way of its own."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = torch.tanh(output.logits)
        return output


@pytest.fixture
def squashed(build_model):
    model = build_model()
    model.__class__ = Squashed
    return model


def test_a_known_head_runs_behind_the_body(build_model):
    model = build_model()
    outputs, state, head = StudentForward(model)(IDS, None, [1, 3])
    assert isinstance(head, OutputHead)
    assert state.shape == (2, 12, 32)
    assert {block: tuple(output.shape) for block, output in outputs.items()} == {1: (2, 12, 32), 3: (2, 12, 32)}
    torch.testing.assert_close(head(state), model(input_ids=IDS).logits)


def test_an_unknown_head_warns_once_and_gives_plain_logits(squashed):
    with pytest.warns(UserWarning, match="Squashed: output head over last hidden state differs .* computed whole"):
        student = StudentForward(squashed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outputs, logits, head = student(IDS, None, [2])
    assert isinstance(head, PlainLogits)
    assert list(outputs) == [2]
    assert torch.equal(logits, squashed(input_ids=IDS).logits)


@pytest.mark.parametrize("chunk_length", [100, 5])
def test_the_loss_over_plain_logits_has_torchs_own_gradient(squashed, chunk_length, chunk_positions):
    chunk_positions(chunk_length)
    with pytest.warns(UserWarning, match="computed whole"):
        student = StudentForward(squashed)

    def terms(logits, chunk):
        return (logits.square().mean(dim=-1) * torch.arange(24)[chunk]).sum().unsqueeze(0)

    _, logits, head = student(IDS, None, [])
    loss, _ = chunked_loss(logits.flatten(0, 1), head, terms, torch.ones(1))
    got = torch.autograd.grad(loss, list(squashed.parameters()))
    want_loss = terms(squashed(input_ids=IDS).logits.flatten(0, 1), slice(0, 24)).sum()
    assert loss.item() == pytest.approx(want_loss.item(), rel=1e-6)
    for one, other in zip(got, torch.autograd.grad(want_loss, list(squashed.parameters())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_head_that_is_more_than_a_linear_map_is_not_taken_apart(build_model):
    class Adapted(nn.Linear):
        def forward(self, values):
            return super().forward(values)

    model = build_model()
    adapted = Adapted(32, 384, bias=False)
    adapted.weight = model.lm_head.weight
    model.lm_head = adapted
    assert "its output head is a Adapted" in head_problem(model, find_structure(model))
