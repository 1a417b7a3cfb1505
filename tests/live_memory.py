"""Counts the bytes of the tensors that live while something runs."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts storages that are made while it is active, until they go.

    Attributes:
        peak: The most bytes that lived at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor) and value.untyped_storage() not in self._seen:
                storage = value.untyped_storage()
                self._seen.add(storage)
                self._live += storage.nbytes()
                weakref.finalize(storage, self._forget, storage.nbytes())
        self.peak = max(self.peak, self._live)
        return made

    def _forget(self, num_bytes: int) -> None:
        self._live -= num_bytes
