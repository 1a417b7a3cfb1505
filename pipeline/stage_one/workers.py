"""The share of one process in the shards that several processes compute together."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from coldstill.pipeline.runtime.errors import RecipeError

_SHARE = re.compile(r"(\d+)/(\d+)")
_AUTO = re.compile(r"auto(?:/(\d+))?")
# Of an array of SLURM, in each of its tasks: which one this is, the least and the largest, their distance, how many.
_SLURM_TASK = "SLURM_ARRAY_TASK_ID"
_SLURM_ARRAY = ("SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_STEP", "SLURM_ARRAY_TASK_COUNT")
# Of an Indexed Job of Kubernetes, in each of its pods: which one this is, from 0 on. Nothing says how many there are.
_KUBERNETES_INDEX = "JOB_COMPLETION_INDEX"

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

    def part(self, of_it: "Share") -> "Share":
        """Return a share of this share."""
        return Share(self.index + self.count * of_it.index, self.count * of_it.count)


def parse_share(text: str) -> Share:
    """Read a share as people write it: 1/4 to 4/4, or `auto` where a scheduler says which one; `auto/4` says how many.

    Raises:
        RecipeError: It is none, or no scheduler says what `auto` leaves open.
    """
    if match := _AUTO.fullmatch(text):
        return _scheduled_share(None if match[1] is None else int(match[1]))
    match = _SHARE.fullmatch(text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise RecipeError(
            f"--worker is {text!r}; expected i/n with i from 1 to n, such as 1/4, or auto where a scheduler says which"
        )
    return Share(int(match[1]) - 1, int(match[2]))


def _scheduled_share(count: int | None) -> Share:
    """Return the share of a task of SLURM's array or of a pod of Kubernetes' Indexed Job.

    Args:
        count: How many workers there are, where the user says it.
    """
    if _SLURM_TASK in os.environ:
        return _slurm_share(count)
    index = _number(_KUBERNETES_INDEX)
    if index is None:
        raise RecipeError(
            f"--worker is auto, and no scheduler says which worker this is: neither {_SLURM_TASK} (a SLURM array) nor "
            f"{_KUBERNETES_INDEX} (a Kubernetes Indexed Job) is set; write i/n, such as 1/4"
        )
    if count is None:
        raise RecipeError(
            f"--worker is auto, and Kubernetes says which worker this is ({_KUBERNETES_INDEX}={index}), but not how "
            "many there are: write auto/n with the Job's completions, such as auto/4"
        )
    if index >= count:
        raise RecipeError(
            f"--worker is auto/{count}, and {_KUBERNETES_INDEX} is {index}, which counts from 0: write auto/n with the "
            "Job's completions"
        )
    return Share(index, count)


def _slurm_share(count: int | None) -> Share:
    task, (least, largest, step, num_tasks) = _number(_SLURM_TASK), map(_number, _SLURM_ARRAY)
    if task is None or least is None or largest is None or not step or not num_tasks:
        raise RecipeError(
            f"--worker is auto, and {_SLURM_TASK} is set, but not all of {', '.join(_SLURM_ARRAY)}: write i/n, such as "
            "1/4"
        )
    index, beside = divmod(task - least, step)
    if beside or index not in range(num_tasks) or (largest - least) // step + 1 != num_tasks:
        raise RecipeError(
            f"--worker is auto, and the array's {num_tasks} tasks from {least} to {largest} are no plain range, so "
            f"{task} does not say which of them this is: submit a range, such as --array=1-4, or write i/n"
        )
    if count not in (None, num_tasks):
        raise RecipeError(f"--worker is auto/{count}, and SLURM's array has {num_tasks} tasks: write auto")
    return Share(index, num_tasks)


def _number(variable: str) -> int | None:
    """Return what a variable of a scheduler says; None where it is not set.

    Raises:
        RecipeError: It is no number.
    """
    text = os.environ.get(variable)
    if text is None:
        return None
    if not text.isdecimal():
        raise RecipeError(f"--worker is auto, and {variable} is {text!r}; expected a number: write i/n, such as 1/4")
    return int(text)


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
