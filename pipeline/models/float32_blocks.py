"""Decoder blocks that compute in float32, though their weights are in half precision.

For what need not be rounded as the model rounds it, such as a calibration: a CPU without instructions for half
precision is many times faster this way. The stream between the blocks keeps the model's dtype, so whatever stands
around them meets what it knows; the weights of one block at a time are there in float32.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import convert_to_fp32, recursively_apply
from torch import Tensor, nn

from coldstill.pipeline.models.block_calls import stands_in

_HALF = (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def float32_blocks(blocks: nn.ModuleList) -> Iterator[None]:
    """Let blocks whose weights are in half precision compute in float32 while the context is open."""
    widened = [_Widened(block) for block in blocks]
    try:
        yield
    finally:
        for block in widened:
            block.end()


class _Widened:
    """Widens a block's weights and inputs in front of it, and narrows its weights and outputs behind it."""

    def __init__(self, block: nn.Module) -> None:
        self._weights: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._handles = [
            block.register_forward_pre_hook(self._before, with_kwargs=True),
            block.register_forward_hook(self._behind),
        ]

    def end(self) -> None:
        """Leave the block as it was, also where it failed half-way."""
        self._narrow()
        for handle in self._handles:
            handle.remove()

    def _before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if stands_in(block):
            self._weights = []  # nothing of this block is at work
            return args, kwargs
        # Looked for now: a block may get its weights only when it is called.
        self._weights = [weight for weight in (*block.parameters(), *block.buffers()) if weight.dtype in _HALF]
        self._kept = [weight.data for weight in self._weights]
        for weight in self._weights:
            weight.data = weight.data.float()
        wide: tuple[Any, Any] = convert_to_fp32((args, kwargs))
        return wide

    def _behind(self, _module: nn.Module, _args: object, output: Any) -> Any:
        self._narrow()
        if not self._weights:
            return output
        dtype = self._weights[0].dtype
        return recursively_apply(lambda value: value.to(dtype) if value.dtype == torch.float32 else value, output)

    def _narrow(self) -> None:
        for weight, data in zip(self._weights, self._kept, strict=False):
            weight.data = data
        self._kept = []
