"""Fit the matrices of a student block that write to the residual stream, by least squares over rows under way.

Shapes: N positions that count, K channels of the student, H inputs of a matrix.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from coldstill.pipeline.models import ModelParts
from coldstill.pipeline.models.block_calls import block_calls
from coldstill.pipeline.models.forward import padded_batches
from coldstill.pipeline.students.axes import WRITERS
from coldstill.pipeline.students.ridge import solve_towards
from coldstill.pipeline.students.under_way import RowsUnderWay, watching

# Of the mean of the Gram matrix's diagonal: what few rows do not tell stays as the cut left it.
RIDGE = 0.3
# Of a block's output, by norm: how far its input plus what its matrices write may be from it, in bfloat16 too.
_TOLERANCE = 0.02


@torch.inference_mode()
def why_no_linear_fit(original: ModelParts, row: Tensor) -> str | None:
    """Say why the writers of a model's students cannot be fitted; None where they can.

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
    stream_BTD, calls = block_calls(original, ids_BT, mask_BT)
    for index, (block, call) in enumerate(zip(original.blocks, calls, strict=True)):
        with watching(block, WRITERS) as seen:
            after_BTD = call.run(block, stream_BTD)
        written_BTD = stream_BTD + sum(seen.outputs[name] for name in WRITERS)
        if (written_BTD - after_BTD).float().norm() > _TOLERANCE * after_BTD.float().norm():
            return f"its block {index} does not add what {' and '.join(WRITERS)} write to its input as it is"
        stream_BTD = after_BTD
    return None


@torch.inference_mode()
def fit_writers(block: nn.Module, index: int, batches: Sequence[RowsUnderWay]) -> None:
    """Fit a student block's writers in place, each to what the student's stream still lacks of its aim behind it.

    The first is fitted to what it reads, the second to what it reads behind the first as it is by then.

    Args:
        block: The student's block, float32.
        index: Its number.
        batches: Rows in front of it, with an aim for each writer.
    """
    for place, writer in enumerate(WRITERS):
        module = cast("nn.Linear", block.get_submodule(writer))
        inputs, device = module.weight.shape[1], module.weight.device
        gram_HH = torch.zeros(inputs, inputs, device=device)
        cross_HK = torch.zeros(inputs, module.weight.shape[0], device=device)
        for batch in batches:
            read_NH, lacking_NK = _read_and_lacking(block, index, batch, place)
            if module.bias is not None:
                lacking_NK -= module.bias
            weighted_NH = read_NH * batch.aims[place].weights_N.unsqueeze(1)
            gram_HH.addmm_(weighted_NH.T, read_NH)
            cross_HK.addmm_(weighted_NH.T, lacking_NK)
        fitted_HK = solve_towards(module.weight.double().T, gram_HH.double(), cross_HK.double(), share=RIDGE)
        module.weight.copy_(fitted_HK.T)


class _ReadEnough(Exception):  # noqa: N818 - nothing went wrong
    """A block has come to the writer that is asked for."""


def _read_and_lacking(block: nn.Module, index: int, batch: RowsUnderWay, place: int) -> tuple[Tensor, Tensor]:
    """Return what a writer reads, [N, H], and what the stream lacks of its aim without it, [N, K]."""
    read: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple[Any, ...]) -> None:
        read.append(args[0])
        raise _ReadEnough  # the rest of the block is not asked for

    handle = block.get_submodule(WRITERS[place]).register_forward_pre_hook(stop)
    try:
        with watching(block, WRITERS[:place]) as seen:
            batch.run_student(block, index)
    except _ReadEnough:
        pass
    finally:
        handle.remove()
    lacking_NK = batch.aims[place].stream_NK.clone()
    for part_BTK in (batch.student_BTK, *seen.outputs.values()):
        lacking_NK -= part_BTK[batch.mask_BT]
    return read[0][batch.mask_BT], lacking_NK
