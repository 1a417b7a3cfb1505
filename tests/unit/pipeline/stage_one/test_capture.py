"""What is asked of a teacher's forward pass, and that no more is done."""

from dataclasses import fields

import pytest
import torch

from coldstill.pipeline.models import take_apart
from coldstill.pipeline.runtime.errors import NonFiniteError
from coldstill.pipeline.stage_one.capture import capture
from coldstill.pipeline.targets.captured import Captured, CaptureRequest, TailRequest, joined, union_of

WHOLE = CaptureRequest(
    blocks=(1, 3),
    ks=(4,),
    temperatures=(1.0, 2.0),
    labels=True,
    final_state=True,
    tails=(TailRequest(4, 6, (1.0,)),),
)


@pytest.fixture(scope="module")
def parts(build_model):
    return take_apart(build_model())


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 380, (length,), generator=generator) for length in (7, 12, 5, 9)]


def captured_of(parts, rows, request: CaptureRequest) -> Captured:
    uniforms_N = torch.linspace(0.1, 0.9, sum(map(len, rows)))
    names = [f"row {index}" for index in range(len(rows))]
    return capture(parts, rows, request, row_names=names, uniforms_N=uniforms_N)


def test_a_union_asks_for_what_any_of_its_requests_asks_for():
    parts = [
        CaptureRequest(blocks=(3,), temperatures=(2.0,)),
        CaptureRequest(blocks=(1, 3), ks=(4,), labels=True),
        CaptureRequest(final_state=True, temperatures=(1.0,), tails=WHOLE.tails),
    ]
    assert union_of(parts) == union_of(reversed(parts)) == WHOLE
    assert union_of([]) == CaptureRequest()
    assert not CaptureRequest(blocks=(0,), final_state=True).needs_logits


def test_nothing_is_kept_that_nobody_asked_for(parts, rows):
    captured = captured_of(parts, rows, CaptureRequest(blocks=(2,)))
    assert captured.hidden_ND.keys() == {2}
    rest = [kept.name for kept in fields(Captured) if kept.name != "hidden_ND"]
    assert not any(getattr(captured, name) for name in rest)
    assert captured.num_bytes == 33 * 32 * 4


@pytest.mark.parametrize(
    ("request_", "runs"),
    [
        (CaptureRequest(blocks=(0, 1), final_state=True), False),
        (CaptureRequest(labels=True), True),
        (CaptureRequest(temperatures=(2.0,)), True),
        (CaptureRequest(ks=(3,)), True),
    ],
)
def test_the_output_head_runs_only_where_logits_are_asked_for(build_model, rows, request_, runs: bool):
    model = build_model()
    parts = take_apart(model)
    # A head of NaNs gives itself away as soon as it is used.
    model.lm_head.weight.data.fill_(torch.nan)
    if runs:
        with pytest.raises(NonFiniteError, match="teacher gave a non-finite value: row 0, .*, position 0"):
            captured_of(parts, rows, request_)
    else:
        assert captured_of(parts, rows, request_).final_state_ND is not None


def test_rows_joined_are_the_rows_side_by_side(parts, rows):
    together = captured_of(parts, rows, WHOLE)
    uniforms_N = torch.linspace(0.1, 0.9, sum(map(len, rows)))
    ends = torch.tensor([0, *map(len, rows)]).cumsum(0).tolist()
    apart = [
        capture(parts, [row], WHOLE, row_names=["row"], uniforms_N=uniforms_N[start : start + len(row)])
        for row, start in zip(rows, ends, strict=False)
    ]
    whole = joined(apart)
    for block in WHOLE.blocks:
        torch.testing.assert_close(whole.hidden_ND[block], together.hidden_ND[block], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.label_logit_N, together.label_logit_N, rtol=1e-4, atol=1e-4)
    assert torch.equal(whole.top_NK[4][1], together.top_NK[4][1])
    assert torch.equal(whole.tail_NM[WHOLE.tails[0]][1], together.tail_NM[WHOLE.tails[0]][1])
    assert whole.num_bytes == together.num_bytes
