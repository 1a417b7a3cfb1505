"""Blocks in half precision compute in float32 for a while, and are then what they were."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coldstill.pipeline.models import ModelParts, take_apart
from coldstill.pipeline.models.float32_blocks import float32_blocks
from coldstill.pipeline.stage_one.capture import capture
from coldstill.pipeline.targets.captured import CaptureRequest

ROWS = [torch.arange(1, 41), torch.arange(60, 77)]  # of two lengths, so that there is a mask


def states(parts: ModelParts) -> dict[str, Tensor]:
    kept = capture(parts, ROWS, CaptureRequest(blocks=(1, 3), final_state=True), row_names=["a", "b"])
    assert kept.final_state_ND is not None
    return {"final": kept.final_state_ND, **{f"block {block}": kept.hidden_ND[block] for block in (1, 3)}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_neox", "gpt2"])
def test_states_are_nearer_to_those_of_float32_and_the_model_is_as_it_was(
    build_model: Callable[..., Any], architecture: str, dtype: torch.dtype
):
    changes = {"sliding_window": 16} if architecture == "gemma3_text" else {}
    # Weights that both have: those of half precision.
    model = build_model(architecture, **changes).to(dtype)
    wide = build_model(architecture, **changes)
    wide.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    parts, exact = take_apart(model), states(take_apart(wide))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = states(parts)
    with float32_blocks(parts.blocks):
        found = states(parts)
    for name, values in found.items():
        assert values.dtype == plain[name].dtype == dtype
        errors = [(each[name].float() - exact[name]).norm() for each in (found, plain)]
        assert errors[0] < 0.8 * errors[1], f"{name}: {errors}"
    check_as_before(model, before)
    assert all(torch.equal(values, plain[name]) for name, values in states(parts).items())


def check_as_before(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert {name: value.dtype for name, value in after.items()} == {name: value.dtype for name, value in before.items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_weights_are_the_models_own_again_where_a_block_fails(build_model: Callable[..., Any]):
    model = build_model().to(torch.bfloat16)
    parts = take_apart(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = parts.blocks[1].self_attn.register_forward_hook(fail)
    with float32_blocks(parts.blocks), pytest.raises(KeyboardInterrupt):
        states(parts)
    handle.remove()
    check_as_before(model, before)


def test_blocks_in_float32_stay_as_they_are(build_model: Callable[..., Any]):
    parts = take_apart(build_model())
    plain = states(parts)
    with float32_blocks(parts.blocks):
        assert all(torch.equal(values, plain[name]) for name, values in states(parts).items())
