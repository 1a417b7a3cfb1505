"""The weights of decoder blocks, brought from files to a block when it is called: two blocks in memory, never all.

A thread reads the block that follows while one is at work. So a model whose blocks have their weights from here runs
like any other, and runs fast where many rows pass one block before the next is called.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from coldstill.pipeline.models.block_calls import stands_in

Weights = Mapping[str, Tensor]


class BlockWeights:
    """Gives each decoder block of a model its weights while it is at work.

    Args:
        blocks: The blocks, their weights on torch's meta device.
        read: Reads the weights of a block onto its device, by their names within the block. Runs in a thread.

    Attributes:
        waited_s: How long blocks that were called have waited for their weights.
    """

    def __init__(self, blocks: nn.ModuleList, read: Callable[[int], Weights]) -> None:
        self.waited_s = 0.0
        self._blocks = blocks
        self._read = read
        self._there: int | None = None
        self._empty: dict[str, Tensor] = {}
        self._ahead: tuple[int, Future[Weights]] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="coldstill-weights")
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(self._bringing(index))

    def bring(self, index: int) -> None:
        """Let a block have its weights; those of the block that had them go.

        Raises:
            ModelError: They cannot be read.
        """
        if self._there == index:
            return
        started = time.perf_counter()
        self.drop()
        weights = self._next(index)
        block = self._blocks[index]
        self._empty = {name: put_weight(block, name, value) for name, value in weights.items()}
        _in_use_here(weights)
        self._there = index
        following = (index + 1) % len(self._blocks)
        if following != index:
            self._ahead = (following, self._thread.submit(self._read, following))
        self.waited_s += time.perf_counter() - started

    def drop(self) -> None:
        """Let the block that has its weights be without them; what is read for the next one stays."""
        if self._there is not None:
            for name, value in self._empty.items():
                put_weight(self._blocks[self._there], name, value)
        self._there, self._empty = None, {}

    def rest(self) -> None:
        """Let no block have its weights, and none be read, until one is called."""
        self.drop()
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead[1].result()

    def _next(self, index: int) -> Weights:
        """Return the weights of a block, which are mostly read already."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            weights = ahead[1].result()
            if ahead[0] == index:
                return weights
            del weights, ahead  # before others are read: two blocks are in memory, not three
        return self._thread.submit(self._read, index).result()

    def _bringing(self, index: int) -> Callable[[nn.Module, Any], None]:
        def bring(block: nn.Module, _args: Any) -> None:
            # A block that another forward stands in for does nothing with its weights.
            if not stands_in(block):
                self.bring(index)

        return bring


def put_weight(outer: nn.Module, name: str, value: Tensor) -> Tensor:
    """Put a weight or a buffer of a module in its place, and return what was there."""
    path, _, leaf = name.rpartition(".")
    module = outer.get_submodule(path)
    before: Tensor = getattr(module, leaf)
    if isinstance(before, nn.Parameter) and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    setattr(module, leaf, value)
    return before


def _in_use_here(weights: Weights) -> None:
    """Tell a GPU's allocator that what a thread's own stream made is used by this one."""
    for value in weights.values():
        if value.is_cuda:
            value.record_stream(torch.cuda.current_stream(value.device))
