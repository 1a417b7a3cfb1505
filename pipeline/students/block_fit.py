"""Train one block of a student, by gradient, towards the original's stream behind it. One optimizer exists at a time.

Shapes: N positions that count, K channels of the student.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coldstill.pipeline.students.under_way import RowsUnderWay

# What a parameter is taken to be at least, by root mean square: one of zeros would stay there.
_LEAST_SCALE = 1e-3


@dataclass(frozen=True)
class BlockFit:
    """How a block is trained; the defaults by measurement: docs/results.md.

    Attributes:
        relative_rate: The learning rate of AdamW without weight decay, at its highest, as a share of the root mean
            square of the parameter that it is of, as Adafactor has it (Shazeer and Stern, arXiv 1804.04235, section 8):
            weights of one model are five times those of another. It rises over `warmup` of the steps and falls to 0 by
            half a cosine.
        num_epochs: How often the rows are passed.
        warmup: A share of the steps.
    """

    relative_rate: float = 5e-3
    num_epochs: int = 1
    warmup: float = 0.1

    def rate_at(self, step: int, num_steps: int) -> float:
        """Return the relative rate of a step, counted from 0."""
        rising = min(1.0, (step + 1) / max(1.0, self.warmup * num_steps))
        return self.relative_rate * rising * 0.5 * (1 + math.cos(math.pi * step / num_steps))


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
        how: Rate and epochs.
    """
    parameters = list(block.parameters())
    wanted_gradient = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    groups = [{"params": [parameter], "scale": _scale_of(parameter)} for parameter in parameters]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    generator = torch.Generator().manual_seed(index)
    num_steps, step = how.num_epochs * len(batches), 0
    with torch.enable_grad():
        for _ in range(how.num_epochs):
            for chosen in torch.randperm(len(batches), generator=generator).tolist():
                for group in optimizer.param_groups:
                    group["lr"] = how.rate_at(step, num_steps) * group["scale"]
                block_loss(block, index, batches[chosen]).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
    for parameter, wanted in zip(parameters, wanted_gradient, strict=True):
        parameter.requires_grad_(wanted)


def _scale_of(parameter: nn.Parameter) -> float:
    return max(float(parameter.detach().square().mean().sqrt()), _LEAST_SCALE)
