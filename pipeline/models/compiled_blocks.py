"""`torch_compile` for a student that learns by its blocks' outputs: each block is compiled by itself.

The whole step cannot be compiled: losses are computed chunk by chunk with their own gradients, and block outputs are
taken by hooks that come and go. A block's forward is compiled beneath its hooks, and one graph serves all blocks.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from coldstill.pipeline.models import find_structure
from coldstill.pipeline.runtime.errors import RecipeError
from coldstill.pipeline.runtime.out_of_memory import is_out_of_memory

KEYS = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
_DEFAULT_BACKEND = "inductor"


@dataclass(frozen=True)
class Compilation:
    """How blocks are compiled.

    Attributes:
        backend: A backend of `torch.compile`.
        mode: A mode of it; None for its own.
    """

    backend: str
    mode: str | None

    @classmethod
    def of(cls, train: Mapping[str, Any]) -> "Compilation | None":
        """Read the `train` section; naming a backend or a mode asks for compilation too. None where nothing does.

        Raises:
            RecipeError: The backend or the mode is unknown.
        """
        if not any(train.get(key) for key in KEYS):
            return None
        wanted = cls(train.get("torch_compile_backend") or _DEFAULT_BACKEND, train.get("torch_compile_mode"))
        known = torch.compiler.list_backends(exclude_tags=())
        if wanted.backend not in known:
            raise RecipeError(f"train.torch_compile_backend {wanted.backend!r} is unknown; one of {', '.join(known)}")
        try:
            wanted.compile(torch.sin)
        except RuntimeError as error:
            raise RecipeError(f"train.torch_compile_mode {wanted.mode!r}: {_in_a_line(error)}") from None
        return wanted

    def compile(self, function: Any) -> Any:
        """Wrap a function, which is compiled when it is first called."""
        return torch.compile(function, backend=self.backend, mode=self.mode)


def compile_blocks(student: PreTrainedModel, compilation: Compilation, device: torch.device) -> None:
    """Let the student's blocks run compiled, from the next call on.

    Raises:
        RecipeError: The backend does not work on this machine, as where the CPU has no C++ compiler.
    """
    try:
        compilation.compile(torch.sin)(torch.zeros(1, device=device))
    except Exception as error:  # whatever a backend finds missing
        if is_out_of_memory(error):
            raise
        raise RecipeError(
            f"train.torch_compile: backend {compilation.backend} does not work here: {_in_a_line(error)}"
        ) from None
    for block in student.get_submodule(find_structure(student).blocks_name).children():
        block.forward = compilation.compile(block.forward)


def _in_a_line(error: Exception) -> str:
    lines = inspect.cleandoc(str(error)).splitlines()
    return lines[0] if lines else type(error).__name__
