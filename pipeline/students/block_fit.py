"""Train one block of a student, by gradient, towards the original's stream behind it. One optimizer exists at a time.

Shapes: N positions that count, K channels of the student.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coldstill.pipeline.students.under_way import RowsUnderWay


@dataclass(frozen=True)
class BlockFit:
    """How a block is trained; the defaults by measurement: docs/results.md.

    Attributes:
        learning_rate: Of AdamW without weight decay, at its highest; it rises over `warmup` of the steps and falls to 0
            by half a cosine.
        num_epochs: How often the rows are passed.
        warmup: A share of the steps.
    """

    learning_rate: float = 1e-3
    num_epochs: int = 1
    warmup: float = 0.1

    def rate_at(self, step: int, num_steps: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        rising = min(1.0, (step + 1) / max(1.0, self.warmup * num_steps))
        return self.learning_rate * rising * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def block_loss(block: nn.Module, index: int, batch: RowsUnderWay) -> Tensor:
    """Return the error of the stream behind a block (`Aim.error_of`), a mean over positions.

    The block reads the student's own stream.

    Args:
        block: The student's block, float32.
        index: Its number.
        batch: Rows in front of it, with an aim behind it.
    """
    return batch.aims[-1].error_of(batch.run_student(block, index)[batch.mask_BT]).mean()


def fit_block(block: nn.Module, index: int, batches: Sequence[RowsUnderWay], how: BlockFit) -> None:
    """Train all weights of a student block in place, one batch a step.

    Args:
        block: The student's block, float32.
        index: Its number; with it the order of batches is drawn.
        batches: Rows in front of it, with an aim behind it.
        how: Learning rate and epochs.
    """
    parameters = list(block.parameters())
    wanted_gradient = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=how.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(index)
    num_steps, step = how.num_epochs * len(batches), 0
    with torch.enable_grad():
        for _ in range(how.num_epochs):
            for chosen in torch.randperm(len(batches), generator=generator).tolist():
                for group in optimizer.param_groups:
                    group["lr"] = how.rate_at(step, num_steps)
                block_loss(block, index, batches[chosen]).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
    for parameter, wanted in zip(parameters, wanted_gradient, strict=True):
        parameter.requires_grad_(wanted)
