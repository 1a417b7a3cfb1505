"""A model's decoder blocks, each run by itself: what they are called with beside the stream, and the call.

Shapes: B rows, T positions, D width.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coldstill.pipeline.models.forward import block_input, block_output, model_inputs, padded_batches
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


@dataclass(frozen=True)
class Entered:
    """A batch behind a model's first block.

    Attributes:
        front_BTD: The stream in front of the first block.
        behind_BTD: The stream behind it.
        calls: How each block is called.
        rest: What blocks return behind the stream; None where they return the stream alone.
    """

    front_BTD: Tensor
    behind_BTD: Tensor
    calls: list[BlockCall]
    rest: tuple[Any, ...] | None


def enter(parts: ModelParts, inputs: Mapping[str, Any]) -> Entered:
    """Run a batch through a model's first block, and record how each block is called.

    The model's own body runs once, without the work of its blocks: all but the first hand on what they are given.

    Args:
        parts: The model.
        inputs: What `coldstill.pipeline.models.forward.model_inputs` gives.
    """
    streams: list[Tensor] = []
    calls: list[BlockCall] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        streams.append(block_input(args, kwargs))
        calls.append(BlockCall(args[1:], {key: value for key, value in kwargs.items() if value is not streams[-1]}))

    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in parts.blocks]
    first: list[Any] = []
    handles.append(parts.blocks[0].register_forward_hook(lambda _module, _args, output: first.append(output)))

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        return _in_form(block_input(args, kwargs), _rest_of(first[0]))

    try:
        with _standing_in(parts.blocks[1:], hand_on):
            parts.body(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return Entered(streams[0], block_output(first[0]), calls, _rest_of(first[0]))


def leave(parts: ModelParts, inputs: Mapping[str, Any], stream_BTD: Tensor, rest: tuple[Any, ...] | None) -> Tensor:
    """Return the last state that a model's body makes of the stream behind its last block, [B, T, D].

    The body runs once more, without any work of its blocks: each gives this stream.

    Args:
        parts: The model.
        inputs: What the batch entered with.
        stream_BTD: The stream.
        rest: What `enter` found that blocks return behind it.
    """
    with _standing_in(parts.blocks, lambda *_args, **_kwargs: _in_form(stream_BTD, rest)):
        state_BTD: Tensor = parts.body(**inputs).last_hidden_state
    return state_BTD


def block_calls(parts: ModelParts, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, list[BlockCall]]:
    """Return the stream in front of the first block, [B, T, D], and how each block is called."""
    entered = enter(parts, model_inputs(ids_BT, mask_BT.long()))
    return entered.front_BTD, entered.calls


def stands_in(block: nn.Module) -> bool:
    """Whether something else is done at the moment in the place of a block's work."""
    return isinstance(vars(block).get("forward"), _StandIn)


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


@dataclass(frozen=True)
class _StandIn:
    """A forward in the place of a block's own."""

    forward: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


@contextmanager
def _standing_in(blocks: Iterable[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Let something else be done in the place of some blocks' work while the context is open."""
    own = [(block, vars(block).get("forward")) for block in blocks]  # accelerate's, where it moves them to a device
    try:
        for block, _ in own:
            block.forward = _StandIn(forward)
        yield
    finally:
        for block, of_block in own:
            del block.forward
            if of_block is not None:
                block.forward = of_block


def _rest_of(output: Any) -> tuple[Any, ...] | None:
    return output[1:] if isinstance(output, tuple) else None


def _in_form(stream_BTD: Tensor, rest: tuple[Any, ...] | None) -> Any:
    """Return a stream as blocks return it."""
    return stream_BTD if rest is None else (stream_BTD, *rest)
