"""Fit what a cut student writes to its residual stream to the stream of the model that it was cut from.

Blocks, neurons and channels that went leave an error in the stream, and the errors of all blocks add up. Here the
matrices that write to the stream are fitted by least squares over calibration rows, one after the other from the first
block on: each from what it reads in the student, whose earlier matrices are fitted already, to what the student's
stream still lacks of the original's behind it. So each makes good what those before it could not (He et al., arXiv
1707.06168, section 3.2, for the channels of convolutions), and a block in front of removed
ones does part of their work, as the linear map of ReplaceMe does (Shopkhoev et al., arXiv 2505.02819).

Shapes: B rows, T positions, N positions that count, D channels of the original, K of the student, H inputs of a matrix.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from coldstill.pipeline.models import ModelParts
from coldstill.pipeline.models.forward import padded_batches
from coldstill.pipeline.students.axes import WRITERS
from coldstill.pipeline.students.block_calls import BlockCall, record_run, run_block
from coldstill.pipeline.students.ridge import solve_towards

# Of the mean of the Gram matrix's diagonal: what few rows do not tell stays as the cut left it.
RIDGE = 0.3
# Of a block's output, by norm: how far its input plus what its matrices write may be from it, in bfloat16 too.
_TOLERANCE = 0.02


@torch.inference_mode()
def why_no_reconstruction(original: ModelParts, row: Tensor) -> str | None:
    """Say why students of a model cannot be reconstructed; None where they can.

    Args:
        original: The model.
        row: Some token ids, [T].
    """
    for index, block in enumerate(original.blocks):
        names = dict(block.named_modules())
        for writer in WRITERS:
            if writer not in names:
                return f"its block {index} has no {writer}"
    ((ids_BT, mask_BT),) = padded_batches([row], original.model)
    run = record_run(original, ids_BT, mask_BT)
    stream_BTD = run.entered_BTD
    for index, (block, call) in enumerate(zip(original.blocks, run.calls, strict=True)):
        with _watching(block) as seen:
            after_BTD = run_block(block, call, stream_BTD)
        written_BTD = stream_BTD + sum(seen.outputs[name] for name in WRITERS)
        if (written_BTD - after_BTD).float().norm() > _TOLERANCE * after_BTD.float().norm():
            return f"its block {index} does not add what {' and '.join(WRITERS)} write to its input as it is"
        stream_BTD = after_BTD
    return None


@torch.inference_mode()
def reconstruct(
    student: ModelParts, original: ModelParts, rows: Sequence[Tensor], *, kept_blocks: Sequence[int], channels_K: Tensor
) -> None:
    """Fit, in place, each matrix of the student that writes to its residual stream.

    A student block is fitted to the original's stream in front of the block that the student's next one was cut from.
    Holds the streams of all rows, and H times (H + K) float32 and float64, while it runs.

    Args:
        student: A model with some of the original's blocks, heads, neurons and channels.
        original: What it was cut from, of which `why_no_reconstruction` has nothing to say.
        rows: Calibration rows of token ids, [T] each.
        kept_blocks: The original block of each of the student's, ascending.
        channels_K: The original channel of each of the student's.
    """
    device = next(student.model.parameters()).device
    channels_K = channels_K.to(device)
    batches = [_Batch.begin(student, original, *batch) for batch in padded_batches(rows, original.model)]
    for batch in batches:
        batch.advance_original(original, 0, kept_blocks[0])
    ends = [*kept_blocks[1:], len(original.blocks)]
    for index, (kept, end) in enumerate(zip(kept_blocks, ends, strict=True)):
        for batch in batches:
            batch.set_targets(original, kept, end, channels_K)
        for writer in range(len(WRITERS)):
            _fit(student.blocks[index], index, writer, batches)
        for batch in batches:
            batch.student_BTK = run_block(student.blocks[index], batch.student_calls[index], batch.student_BTK)


@dataclass
class _Batch:
    """A few rows on their way through both models.

    Attributes:
        mask_BT: Which positions are real.
        original_BTD: The original's stream in front of its next block.
        student_BTK: The student's.
        original_calls: Of each of the original's blocks.
        student_calls: Of each of the student's.
        targets_NK: By writer of the block at hand, the original's stream behind it, in the student's channels.
        weights_N: By writer, one over that stream's mean square over all its channels: positions count alike.
    """

    mask_BT: Tensor
    original_BTD: Tensor
    student_BTK: Tensor
    original_calls: list[BlockCall]
    student_calls: list[BlockCall]
    targets_NK: list[Tensor] = field(default_factory=list)
    weights_N: list[Tensor] = field(default_factory=list)

    @classmethod
    def begin(cls, student: ModelParts, original: ModelParts, ids_BT: Tensor, mask_BT: Tensor) -> "_Batch":
        """Put rows in front of the first blocks."""
        of_original, of_student = (record_run(parts, ids_BT, mask_BT) for parts in (original, student))
        return cls(mask_BT, of_original.entered_BTD, of_student.entered_BTD, of_original.calls, of_student.calls)

    def advance_original(self, original: ModelParts, start: int, end: int) -> None:
        """Run the original's blocks from start to before end."""
        for block in range(start, end):
            self.original_BTD = run_block(original.blocks[block], self.original_calls[block], self.original_BTD)

    def set_targets(self, original: ModelParts, block: int, end: int, channels_K: Tensor) -> None:
        """Run the original's block and those up to the end, and keep the stream behind its first writer and there."""
        before_BTD = self.original_BTD
        with _watching(original.blocks[block]) as seen:
            self.advance_original(original, block, block + 1)
        self.advance_original(original, block + 1, end)
        streams = [before_BTD + seen.outputs[WRITERS[0]], self.original_BTD]
        counted = [stream_BTD[self.mask_BT].float() for stream_BTD in streams]
        self.targets_NK = [stream_ND[:, channels_K] for stream_ND in counted]
        self.weights_N = [1.0 / stream_ND.square().mean(dim=-1).clamp(min=1e-12) for stream_ND in counted]


@dataclass
class _Seen:
    """What the writers of a block read and wrote in its last run."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


def _fit(block: nn.Module, index: int, writer: int, batches: Sequence[_Batch]) -> None:
    """Fit one of a student block's writers to what the stream lacks behind it."""
    module = cast("nn.Linear", block.get_submodule(WRITERS[writer]))
    inputs, device = module.weight.shape[1], module.weight.device
    gram_HH = torch.zeros(inputs, inputs, device=device)
    cross_HK = torch.zeros(inputs, module.weight.shape[0], device=device)
    for batch in batches:
        with _watching(block) as seen:
            run_block(block, batch.student_calls[index], batch.student_BTK)
        lacking_NK = batch.targets_NK[writer].clone()
        for part_BTK in (batch.student_BTK, *(seen.outputs[name] for name in WRITERS[:writer])):
            lacking_NK -= part_BTK[batch.mask_BT].float()
        if module.bias is not None:
            lacking_NK -= module.bias.float()
        read_NH = seen.inputs[WRITERS[writer]][batch.mask_BT].float()
        weighted_NH = read_NH * batch.weights_N[writer].unsqueeze(1)
        gram_HH += weighted_NH.T @ read_NH
        cross_HK += weighted_NH.T @ lacking_NK
    fitted_HK = solve_towards(module.weight.double().T, gram_HH.double(), cross_HK.double(), share=RIDGE)
    module.weight.copy_(fitted_HK.T)


@contextmanager
def _watching(block: nn.Module) -> Iterator[_Seen]:
    seen = _Seen()

    def hook_of(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen.inputs[name], seen.outputs[name] = args[0], output

        return hook

    handles = [block.get_submodule(name).register_forward_hook(hook_of(name)) for name in WRITERS]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
