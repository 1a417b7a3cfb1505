"""A batch on its way through a model's blocks, one block at a time: it waits while other batches pass the same block.

What it is called with, and what the model makes of its last stream, is the work of the model's own body; so every
number is the one that the model gives when it runs the batch by itself.

Shapes: B rows, T positions, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coldstill.pipeline.models.block_calls import BlockCall, enter, leave
from coldstill.pipeline.models.forward import InputOf, Place, RowSides
from coldstill.pipeline.models.structure import ModelParts


class Passage:
    """A batch in front of a model's first block.

    Args:
        parts: The model.
        inputs: The batch, as `coldstill.pipeline.models.forward.model_inputs` gives it.
        switches: What `rope_switches` gives of the model.
    """

    def __init__(self, parts: ModelParts, inputs: Mapping[str, Any], switches: Sequence[int]) -> None:
        self._parts = parts
        self._sides = RowSides.of(inputs, switches)
        self._ways = [_Way(of_side) for of_side in self._sides.inputs]

    @torch.inference_mode()
    def step(self, index: int, *, wait_at: torch.device) -> dict[Place, Tensor]:
        """Run the batch through a block, the next one, and return the stream [B, T, D] in front of it and behind it.

        Args:
            index: The block's number.
            wait_at: Where the stream lies until the next step.
        """
        pairs = [way.step(self._parts, index, wait_at) for way in self._ways]
        front, behind = ([pair[place] for pair in pairs] for place in (0, 1))
        return {InputOf(index): self._sides.join(front), index: self._sides.join(behind)}

    @torch.inference_mode()
    def last_state(self) -> Tensor:
        """Return the model's last state [B, T, D], once the batch has passed all blocks; it passes no other."""
        return self._sides.join([way.leave(self._parts) for way in self._ways])

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds between two steps: its stream, and what its blocks are called with."""
        tensors = {value.untyped_storage().data_ptr(): value for way in self._ways for value in way.tensors()}
        return sum(value.nbytes for value in tensors.values())


@dataclass
class _Way:
    """The rows of a batch that the model may run together, between two blocks."""

    inputs: Mapping[str, Any]
    stream_BTD: Tensor | None = None
    calls: Sequence[BlockCall] = ()
    rest: tuple[Any, ...] | None = None

    def step(self, parts: ModelParts, index: int, wait_at: torch.device) -> tuple[Tensor, Tensor]:
        if index == 0:
            entered = enter(parts, self.inputs)
            front_BTD, behind_BTD = entered.front_BTD, entered.behind_BTD
            self.calls, self.rest = entered.calls, entered.rest
        else:
            assert self.stream_BTD is not None, "blocks are passed from the first on"
            front_BTD = self.stream_BTD.to(self.inputs["input_ids"].device)
            behind_BTD = self.calls[index].run(parts.blocks[index], front_BTD)
        self.stream_BTD = behind_BTD.to(wait_at)
        return front_BTD, behind_BTD

    def leave(self, parts: ModelParts) -> Tensor:
        assert self.stream_BTD is not None
        stream_BTD, self.stream_BTD, self.calls = self.stream_BTD, None, ()
        return leave(parts, self.inputs, stream_BTD.to(self.inputs["input_ids"].device), self.rest)

    def tensors(self) -> list[Tensor]:
        called = [value for call in self.calls for value in _leaves((call.args, call.kwargs))]
        return called if self.stream_BTD is None else [self.stream_BTD, *called]


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [leaf for item in items for leaf in _leaves(item)]
