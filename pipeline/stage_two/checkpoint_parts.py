"""A distiller's state in its two parts, as checkpoints and exports keep them: the student's, and the projectors'."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from coldstill.cache.errors import CorruptError, StoreNotFoundError
from coldstill.pipeline.runtime.errors import ModelError
from coldstill.pipeline.runtime.out_of_memory import is_out_of_memory

PROJECTORS_FILE = "projectors.safetensors"

_STUDENT, _PROJECTORS = "student.", "projectors."


def of_student(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the student's part of a distiller's state, by the student's own names."""
    return {name.removeprefix(_STUDENT): value for name, value in state.items() if name.startswith(_STUDENT)}


def of_projectors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the projectors' part of a distiller's state; empty where all are the identity."""
    return {name: value.contiguous() for name, value in state.items() if name.startswith(_PROJECTORS)}


@contextlib.contextmanager
def as_it_was_saved(checkpoint: Path) -> Iterator[None]:
    """Refuse a checkpoint that has not all that was saved in it.

    Raises:
        CorruptError: It has not.
    """
    try:
        yield
    except (ModelError, SafetensorError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise CorruptError(
            f"checkpoint {checkpoint} is not as it was saved: {' '.join(str(error).split())}; remove it to go on from "
            "an earlier one, or begin anew: coldstill train --restart"
        ) from None


def read_projectors(folder: Path) -> dict[str, Tensor]:
    """Read a checkpoint's projectors, as the module that holds them names them.

    Raises:
        StoreNotFoundError: It has none.
    """
    try:
        state = load_file(folder / PROJECTORS_FILE)
    except FileNotFoundError:
        raise StoreNotFoundError(
            f"checkpoint {folder} has no {PROJECTORS_FILE}; run: coldstill train --restart"
        ) from None
    return {name.removeprefix(_PROJECTORS): value for name, value in state.items()}
