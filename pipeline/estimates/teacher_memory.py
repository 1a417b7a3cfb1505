"""What a recipe's teacher takes in memory, and how many tokens pass its blocks together where it streams in."""

from dataclasses import dataclass

import torch

from coldstill.pipeline.models.machine import free_bytes
from coldstill.pipeline.models.sizes import ModelSizes
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.recipe.sections import Placement
from coldstill.pipeline.stage_one.streamed_capture import SHARE_OF_FREE

_HOST = torch.device("cpu")


@dataclass(frozen=True)
class TeacherMemory:
    """What a teacher takes in memory on this machine.

    Attributes:
        placement: How its weights lie there: `whole`, `streamed` or `spread`.
        weight_bytes: Its weights that are there at once.
        num_blocks: How many decoder blocks it has; two are there at once where it streams in.
        super_batch_tokens: How many tokens may pass its blocks together at most; None where it does not stream in.
    """

    placement: Placement
    weight_bytes: int
    num_blocks: int
    super_batch_tokens: int | None

    @classmethod
    def of(cls, teacher: Teacher) -> "TeacherMemory":
        """Measure a teacher that is not loaded yet, by the headers of its files and the memory that is free."""
        weights = teacher.weights
        if teacher.placement != "streamed":
            return cls(teacher.placement, weights.total, weights.num_blocks, None)
        left = free_bytes(_HOST) - (weights.streamed if teacher.device == _HOST else 0)
        per_token = waiting_bytes_per_token(ModelSizes.of(teacher.config), teacher.dtype)
        return cls(teacher.placement, weights.streamed, weights.num_blocks, affordable_tokens(left, per_token))


def waiting_bytes_per_token(sizes: ModelSizes, dtype: str) -> int:
    """Return what a token holds while it waits between two blocks: the residual stream, in the teacher's dtype."""
    return sizes.width * int(getattr(torch, dtype).itemsize)


def affordable_tokens(free: float, bytes_per_token: int) -> int:
    """Return how many tokens may wait between two blocks, by the bytes of memory that are free."""
    return max(0, int(SHARE_OF_FREE * free / bytes_per_token))
