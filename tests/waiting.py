"""What a step asks of a device, and what a GPU would have to be waited for; seen on any device.

On a GPU, whoever asks for a number, or takes values by a mask, waits until all is done that the GPU was given.
"""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim")
_BY_INDEX = ("index", "index_put", "index_put_", "_index_put_impl_")
_FROM_THE_HOST = (torch.tensor, torch.as_tensor)
# Where batches are made: what is asked there, no device is asked.
_OF_THE_HOST = "stage_two/completing.py"


class _Numbers(TorchDispatchMode):
    """Notes every operation whose outcome the host has to know."""

    def __init__(self, found: "Waits") -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in _BY_INDEX and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in _WAITING or by_mask:
            self._found.note(name)
        return func(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    """Notes every number that is brought to a named device by a copy that is waited for."""

    def __init__(self, found: "Waits") -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func in _FROM_THE_HOST
            and (kwargs or {}).get("device") is not None
            and not isinstance(args[0], torch.Tensor)
        ):
            self._found.note(func.__name__)
        return func(*args, **(kwargs or {}))


class Waits(Counter[str]):
    """What was waited for, by the line that asked for it."""

    def note(self, name: str) -> None:
        frames = traceback.extract_stack()
        if any(frame.filename.endswith(_OF_THE_HOST) for frame in frames):
            return
        last = [frame for frame in frames if "/torch/" not in frame.filename and frame.filename != __file__][-1]
        self[f"{name} at {last.filename.rpartition('/site-packages/')[2]}:{last.lineno}"] += 1


@contextmanager
def waits() -> Iterator[Waits]:
    """Note what is waited for within; backward passes of the main thread are seen too."""
    found = Waits()
    with _Copies(found), _Numbers(found):
        yield found
