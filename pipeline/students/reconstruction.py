"""Fit a cut student to the residual stream of the model that it was cut from, block by block.

Blocks, neurons and channels that went leave an error in the stream, and the errors of all blocks add up. Here each
block of the student, from the first on, is fitted to give behind it the stream that the original has there, from what
the student's own stream is in front of it: so each makes good what those before it could not (He et al., arXiv
1707.06168, section 3.2, for the channels of convolutions), and a block in front of removed ones does part of their
work.

`linear` fits the two matrices of a block that write to the stream, by least squares: the linear map of ReplaceMe does
that for a block in front of removed ones (Shopkhoev et al., arXiv 2505.02819). `blocks` then trains all of the block's
weights by gradient, a local reconstruction with the block's nonlinear parts in its window (arXiv 2510.14444).

Shapes: T positions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from coldstill.pipeline.models import ModelParts
from coldstill.pipeline.models.block_calls import why_not_alone
from coldstill.pipeline.recipe.student import ReconstructMethod
from coldstill.pipeline.students.block_fit import BlockFit, fit_block
from coldstill.pipeline.students.under_way import Channels, RowsUnderWay, Span
from coldstill.pipeline.students.writer_fit import fit_writers, why_no_linear_fit


def why_no_reconstruction(original: ModelParts, row: Tensor, method: ReconstructMethod) -> str | None:
    """Say why students of a model cannot be reconstructed by a method; None where they can.

    Args:
        original: The model.
        row: Some token ids, [T].
        method: `linear` or `blocks`.
    """
    return why_not_alone(original, row) or (why_no_linear_fit(original, row) if method == "linear" else None)


@torch.no_grad()
def reconstruct(
    student: ModelParts,
    original: ModelParts,
    rows: Sequence[Tensor],
    *,
    stands_for: Sequence[Span],
    channels: Channels,
    method: ReconstructMethod,
    show_progress: bool = True,
) -> list[float]:
    """Fit the student's blocks in place, one after the other.

    Holds the streams of all rows in both models, float32, and of one block at a time a copy in float32, and what its
    fit needs: its optimizer, or H times (H + K) float32 and float64 for H inputs of a matrix.

    Args:
        student: A model with some of the original's blocks and channels.
        original: What it was cut from, of which `why_no_reconstruction` has nothing to say.
        rows: Calibration rows of token ids, [T] each.
        stands_for: The original's blocks that each of the student's stands for, one behind the other.
        channels: How the original's stream is said in the student's channels.
        method: `linear` or `blocks`, which begins with the linear fit where the architecture allows it.
        show_progress: Whether to show a progress bar.

    Returns:
        By block, the squared error of the stream behind it relative to the original's, a mean over positions.
    """
    has_writers = why_no_linear_fit(original, rows[0]) is None
    batches = RowsUnderWay.begin(student, original, rows)
    for batch in batches:
        batch.advance_original(original, 0, stands_for[0].start)
    errors: list[float] = []
    is_exact = True
    is_float32 = next(original.model.parameters()).dtype == torch.float32
    bar = tqdm(stands_for, unit="block", desc=f"reconstruct ({method})", disable=not show_progress)
    for index, span in enumerate(bar):
        for batch in batches:
            batch.aim_behind(original, span, channels, has_writers=has_writers)
        block = student.blocks[index]
        # In front of the first cut there is nothing to make good, and a fit would only disturb.
        # Where an original's block is the only one of its span, it was the last to run, and so has its weights.
        is_exact = is_exact and _is_untouched(block, original.blocks[span.start], span)
        if not is_exact:
            _fit(block, index, batches, method, has_writers=has_writers)
        errors.append(_follow(batches) if is_exact and is_float32 else _advance(block, index, batches))
        bar.set_postfix(error=f"{errors[-1]:.3g}")
    return errors


def _fit(
    block: nn.Module, index: int, batches: Sequence[RowsUnderWay], method: ReconstructMethod, *, has_writers: bool
) -> None:
    """Fit a student block in float32."""
    dtype = next(block.parameters()).dtype
    block.float()
    if has_writers:
        fit_writers(block, index, batches)
    if method == "blocks":
        fit_block(block, index, batches, BlockFit())
    block.to(dtype)


def _advance(block: nn.Module, index: int, batches: Sequence[RowsUnderWay]) -> float:
    """Put the student's streams behind a block as it is kept, and return their mean error there."""
    dtype = next(block.parameters()).dtype
    block.float()
    errors: list[Tensor] = []
    for batch in batches:
        batch.student_BTK = batch.run_student(block, index)
        errors.append(batch.aims[-1].error_of(batch.student_BTK[batch.mask_BT]))
    block.to(dtype)
    return float(torch.cat(errors).mean())


def _follow(batches: Sequence[RowsUnderWay]) -> float:
    """Put the student's streams behind a block that is the original's own, in the original's dtype: where its are."""
    for batch in batches:
        batch.student_BTK = batch.original_BTD
    return 0.0


def _is_untouched(block: nn.Module, original: nn.Module, span: Span) -> bool:
    """Whether a student's block is the original's, and stands for it alone."""
    own, theirs = block.state_dict(), original.state_dict()
    return span.end == span.start + 1 and all(torch.equal(value, theirs[name]) for name, value in own.items())
