"""The share of one process in the shards that several processes compute together."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from coldstill.pipeline.runtime.errors import RecipeError

_SHARE = re.compile(r"(\d+)/(\d+)")

Item = TypeVar("Item")


@dataclass(frozen=True)
class Share:
    """Every `count`-th shard, from the one with number `index` on; all of them by default.

    Attributes:
        index: 0-based number of this process.
        count: How many processes there are.
    """

    index: int = 0
    count: int = 1

    def of(self, items: Sequence[Item]) -> list[Item]:
        """Return this process's items: shares are disjoint, and all of them together are everything."""
        return list(items[self.index :: self.count])


def parse_share(text: str) -> Share:
    """Read a share as people write it: 1/4 to 4/4.

    Raises:
        RecipeError: It is none.
    """
    match = _SHARE.fullmatch(text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise RecipeError(f"--worker is {text!r}; expected i/n with i from 1 to n, such as 1/4")
    return Share(int(match[1]) - 1, int(match[2]))


def launched_share() -> Share:
    """Return the share that torchrun or accelerate launch gave this process; all where neither did."""
    return Share(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Let the first of the launched processes do something before the others; alone, a process just does it."""
    if launched_share().count == 1:
        yield
        return
    with _state().main_process_first():
        yield


def wait_for_everyone() -> None:
    """Wait until all launched processes are here."""
    if launched_share().count > 1:
        _state().wait_for_everyone()


def sum_over_processes(values: Sequence[int]) -> list[int]:
    """Add up numbers of all launched processes."""
    if launched_share().count == 1:
        return list(values)
    from accelerate.utils import gather_object

    return [sum(of_all) for of_all in zip(*gather_object([list(values)]), strict=True)]


def _state() -> Any:
    # Gloo where there is no accelerator: what is exchanged here is a few numbers.
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())
