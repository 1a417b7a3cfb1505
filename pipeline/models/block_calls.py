"""A model's decoder blocks, each run by itself: what they are called with beside the stream, and the call.

Shapes: B rows, T positions, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coldstill.pipeline.models.forward import block_input, block_output, padded_batches
from coldstill.pipeline.models.structure import ModelParts

# Of the last state, by norm: how far blocks that are run by themselves may end from it, in bfloat16 too.
_TOLERANCE = 0.02


@dataclass(frozen=True)
class BlockCall:
    """What a block is called with beside the stream, such as masks and rotary factors."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, stream_BTD: Tensor) -> Tensor:
        """Run the block on a stream, and return the stream behind it."""
        return block_output(block(stream_BTD, *self.args, **self.kwargs))

    def in_float32(self) -> "BlockCall":
        """Return the call of a block that computes in float32."""
        return BlockCall(_in_float32(self.args), _in_float32(self.kwargs))


def block_calls(parts: ModelParts, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, list[BlockCall]]:
    """Return the stream in front of the first block, [B, T, D], and how each block is called.

    The model's own body runs once, without the work of its blocks: all but the first hand on what they are given.
    """
    streams: list[Tensor] = []
    calls: list[BlockCall] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        streams.append(block_input(args, kwargs))
        calls.append(BlockCall(args[1:], {key: value for key, value in kwargs.items() if value is not streams[-1]}))

    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in parts.blocks]
    try:
        with _standing_in(parts.blocks):
            parts.body(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return streams[0], calls


@torch.inference_mode()
def why_not_alone(parts: ModelParts, row: Tensor) -> str | None:
    """Say why a model's blocks cannot be run one by one; None where they give the last state that it gives.

    Args:
        parts: The model.
        row: Some token ids, [T].
    """
    ((ids_BT, mask_BT),) = padded_batches([row], parts.model)
    whole_BTD = parts.body(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False).last_hidden_state
    stream_BTD, calls = block_calls(parts, ids_BT, mask_BT)
    if stream_BTD.dim() != whole_BTD.dim():
        return f"its blocks hand on {len(stream_BTD)} streams, and not one"
    try:
        for block, call in zip(parts.blocks, calls, strict=True):
            stream_BTD = call.run(block, stream_BTD)
    except (ValueError, KeyError, AttributeError, TypeError, IndexError, RuntimeError) as error:
        return f"one of its blocks does not run by itself: {' '.join(str(error).split()) or type(error).__name__}"
    state_BTD = stream_BTD if parts.final_norm is None else parts.final_norm(stream_BTD)
    if (state_BTD - whole_BTD).float().norm() > _TOLERANCE * whole_BTD.float().norm():
        return "its blocks, run one after the other, do not give what it gives: they share more than the stream"
    return None


def _in_float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _in_float32(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(_in_float32, value))
    return value


@contextmanager
def _standing_in(blocks: nn.ModuleList) -> Iterator[None]:
    """Let all blocks but the first hand on the stream, in the form in which the first gives it."""
    first: list[Any] = []
    handle = blocks[0].register_forward_hook(lambda _module, _args, output: first.append(output))

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        stream = block_input(args, kwargs)
        return (stream, *first[0][1:]) if isinstance(first[0], tuple) else stream

    own = [vars(block).get("forward") for block in blocks]  # accelerate's, where it moves blocks between devices
    try:
        for block in blocks[1:]:
            block.forward = hand_on
        yield
    finally:
        handle.remove()
        for block, forward in zip(blocks[1:], own[1:], strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
