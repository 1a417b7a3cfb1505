"""Blocks run one by one give what the model gives, and recording how they are called costs the work of one."""

import pytest
import torch
from hooks import has_hooks

from coldstill.pipeline.models import find_parts, take_apart
from coldstill.pipeline.models.block_calls import BlockCall, block_calls, why_not_alone
from coldstill.pipeline.models.forward import block_outputs, pad_rows

ROWS = [torch.randint(1, 384, (length,), generator=torch.Generator().manual_seed(length)) for length in (24, 17, 9)]
ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "olmo2", "gpt2", "gpt_neox", "phi3"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_run_one_by_one_give_every_stream_of_the_whole_model(build_model, architecture):
    parts = take_apart(build_model(architecture, sliding_window=8))
    ids_BT, mask_BT = pad_rows(ROWS)
    with torch.no_grad():
        with block_outputs(parts.blocks, range(4)) as expected:
            parts.body(input_ids=ids_BT, attention_mask=mask_BT.long())
        stream_BTD, calls = block_calls(parts, ids_BT, mask_BT)
        for index, (block, call) in enumerate(zip(parts.blocks, calls, strict=True)):
            stream_BTD = call.run(block, stream_BTD)
            torch.testing.assert_close(stream_BTD[mask_BT], expected[index][mask_BT])
    assert why_not_alone(parts, ROWS[0]) is None


def test_recording_runs_one_block_and_leaves_nothing_behind(build_model):
    model = build_model()
    parts = take_apart(model)
    mlps_run: list[int] = []
    handles = [
        block.mlp.register_forward_hook(lambda *_, index=index: mlps_run.append(index))
        for index, block in enumerate(parts.blocks)
    ]
    block_calls(parts, *pad_rows(ROWS))
    assert mlps_run == [0]
    for handle in handles:
        handle.remove()
    assert not has_hooks(model)
    assert not any("forward" in vars(block) for block in parts.blocks)


def test_a_forward_that_was_put_over_a_blocks_own_is_there_again(build_model):
    parts = take_apart(build_model())
    block = parts.blocks[2]
    ran: list[int] = []
    own = block.forward

    def moved(*args, **kwargs):
        ran.append(2)
        return own(*args, **kwargs)

    block.forward = moved
    block_calls(parts, *pad_rows(ROWS))
    assert block.forward is moved
    assert ran == []


def test_blocks_are_left_as_they_were_when_the_body_fails(build_model):
    model = build_model()
    parts = take_apart(model)
    with pytest.raises(IndexError):
        block_calls(parts, torch.full((1, 4), 10**6), torch.ones(1, 4, dtype=torch.bool))
    assert not has_hooks(model)
    assert not any("forward" in vars(block) for block in parts.blocks)


def test_a_model_of_several_streams_says_so(build_model):
    parts = find_parts(build_model("gemma3n_text", head_dim=8, num_kv_shared_layers=0))
    assert why_not_alone(parts, ROWS[0]) == "its blocks hand on 4 streams, and not one"


def test_a_call_in_float32_is_the_same_but_for_its_floating_tensors():
    table = torch.ones(2, dtype=torch.bfloat16)
    call = BlockCall(
        (table, 3), {"pair": (table, None), "mask": torch.ones(2, dtype=torch.bool), "by": {"name": [table]}}
    )
    again = call.in_float32()
    assert again.args[0].dtype == again.kwargs["pair"][0].dtype == again.kwargs["by"]["name"][0].dtype == torch.float32
    assert (again.args[1], again.kwargs["pair"][1], again.kwargs["mask"].dtype) == (3, None, torch.bool)
    assert isinstance(again.kwargs["pair"], tuple)
