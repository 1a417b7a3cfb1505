"""Run a model's decoder blocks one by one: each as the model calls it, on whatever stream is to enter it.

Shapes: B rows, T positions, D channels of the stream.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from coldstill.pipeline.models import ModelParts
from coldstill.pipeline.models.forward import block_input, block_output


@dataclass(frozen=True)
class BlockCall:
    """What a block is called with beside its input.

    Attributes:
        args: By place, behind the input.
        kwargs: By name, without the input.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class RecordedRun:
    """What a model's blocks were called with when it ran over some rows.

    Attributes:
        entered_BTD: The stream in front of the first block.
        calls: Of each block.
        state_BTD: The body's last state, behind the final norm.
    """

    entered_BTD: Tensor
    calls: list[BlockCall]
    state_BTD: Tensor


def record_run(parts: ModelParts, ids_BT: Tensor, mask_BT: Tensor) -> RecordedRun:
    """Run a model over rows, and keep what each of its blocks is called with."""
    entered: list[Tensor] = []
    calls: list[BlockCall] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not entered:
            entered.append(block_input(args, kwargs))
        # Of a block that is given all by name, the input is taken out.
        beside = kwargs if args else {name: value for name, value in kwargs.items() if name != "hidden_states"}
        calls.append(BlockCall(args[1:], beside))

    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in parts.blocks]
    try:
        output = parts.body(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return RecordedRun(entered[0], calls, output.last_hidden_state)


def run_block(block: nn.Module, call: BlockCall, stream: Tensor) -> Tensor:
    """Return the stream behind a block that is called as it was recorded, on another stream."""
    return block_output(block(stream, *call.args, **call.kwargs))
