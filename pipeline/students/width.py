"""Cut a model in width: neurons of its gated MLPs, channels of its residual stream. Heads stay whole.

Shapes: N positions, D channels, I neurons.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coldstill.pipeline.models import ModelParts, take_apart
from coldstill.pipeline.models.forward import block_outputs, padded_batches
from coldstill.pipeline.students.axes import (
    MLP_OUTPUT,
    Axis,
    embedding_name,
    final_norm_name,
    is_tied,
    mlp_size,
    parameter_axes,
    weight_of,
)
from coldstill.pipeline.students.model_copies import changed_config, model_from_state
from coldstill.pipeline.students.norms import scaled_weight
from coldstill.pipeline.students.read_correction import ReadCorrections, fit_read_corrections

# Numbers of neurons are multiples of this: hardware multiplies such matrices fastest.
NEURON_MULTIPLE = 8


def neurons_kept(share: float, size: int) -> int:
    """Return how many of so many neurons a share is, to the nearest multiple of 8."""
    return max(NEURON_MULTIPLE, round(share * size / NEURON_MULTIPLE) * NEURON_MULTIPLE)


@torch.inference_mode()
def neuron_importances(parts: ModelParts, rows: Sequence[Tensor], *, method: str) -> list[Tensor]:
    """Return each block's importances of its neurons, [I].

    `weights`: the span from largest to smallest weight (max + |min|) of the neuron's row of the gate, plus that of its
    row of the up projection (Martra, Rearchitecting LLMs; MAW in optipfair). `activations`: the neuron's root mean
    square over the rows' positions times the norm of what it writes to the stream, as Wanda weighs weights
    (Sun et al., arXiv 2306.11695).

    Args:
        parts: The model.
        rows: Calibration rows of token ids, [T] each; `weights` reads none.
        method: `weights` or `activations`.
    """
    if method == "weights":
        return [
            _span(weight_of(block, "mlp.gate_proj")) + _span(weight_of(block, "mlp.up_proj")) for block in parts.blocks
        ]
    outputs = [block.get_submodule(MLP_OUTPUT) for block in parts.blocks]
    weights = [weight_of(block, MLP_OUTPUT) for block in parts.blocks]
    squares = [torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device) for weight in weights]
    handles = []
    mask_BT = torch.empty(0)
    for output, total in zip(outputs, squares, strict=True):

        def add(_module: object, args: tuple[Tensor, ...], total: Tensor = total) -> None:
            total += args[0][mask_BT].double().square().sum(dim=0)

        handles.append(output.register_forward_pre_hook(add))
    try:
        for ids_BT, mask_BT in padded_batches(rows, parts.model):
            parts.body(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [total.sqrt() * weight.double().norm(dim=0) for total, weight in zip(squares, weights, strict=True)]


@torch.inference_mode()
def channel_importances(parts: ModelParts, rows: Sequence[Tensor]) -> Tensor:
    """Return each channel's share of the residual stream's energy, [D], summed over block inputs and the last output.

    At every position the stream counts as much, as it does for the norms that read it. Ranks channels by activations
    as Minitron does (Muralidharan et al., arXiv 2407.14679, section 2.2), which sums magnitudes behind the norms; on
    SmolLM2-135M, 576 to 448 channels, energies left a lower perplexity.
    """
    device = next(parts.model.parameters()).device
    total_D = torch.zeros(parts.hidden_size, dtype=torch.float64, device=device)
    for ids_BT, mask_BT in padded_batches(rows, parts.model):
        with block_outputs(parts.blocks, range(len(parts.blocks))) as outputs:
            parts.body(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False)
        for state_BTD in (parts.model.get_input_embeddings()(ids_BT), *outputs.values()):
            square_ND = state_BTD[mask_BT].double().square()
            total_D += (square_ND / square_ND.sum(dim=-1, keepdim=True).clamp(min=1e-30)).sum(dim=0)
    return total_D


def most_important(importances: Tensor, number: int) -> Tensor:
    """Return the indices of the most important, in order of index; of equal ones the earlier."""
    return importances.sort(descending=True, stable=True).indices[:number].sort().values


@torch.no_grad()
def narrow_mlps(parts: ModelParts, neurons: Sequence[Tensor]) -> PreTrainedModel:
    """Make the model whose blocks keep only some neurons, as many in each; the original is left as it was.

    Raises:
        ModelError: The model is not built as `coldstill.pipeline.students.axes` knows it.
    """
    mlp_size(parts)
    prefix = f"{parts.blocks_name}."
    state = parts.model.state_dict()
    for name, axes in parameter_axes(parts).items():
        if "neurons" in axes:
            kept = neurons[int(name.removeprefix(prefix).partition(".")[0])]
            state[name] = _sliced(state[name], axes, "neurons", kept)
    config = changed_config(parts.model.config, intermediate_size=len(neurons[0]))
    return model_from_state(config, state, like=parts.model)


@torch.no_grad()
def narrow_stream(parts: ModelParts, channels_K: Tensor, rows: Sequence[Tensor]) -> PreTrainedModel:
    """Make the model whose residual stream has only some channels; the original is left as it was.

    Every matrix that touches the stream is sliced, and what reads it is corrected over the rows
    (`coldstill.pipeline.students.read_correction`). Heads keep their number and width.

    Raises:
        ModelError: The model is not built as `coldstill.pipeline.students.axes` knows it, or does not allow the width.
    """
    axes = parameter_axes(parts)
    config = changed_config(parts.model.config, hidden_size=len(channels_K), head_dim=parts.head_dim)
    corrections = fit_read_corrections(parts, channels_K, rows)
    student = model_from_state(config, _narrow_state(parts, axes, channels_K, corrections), like=parts.model)
    restore_embedding_scale(student, parts)
    return student


def _narrow_state(
    parts: ModelParts, axes: dict[str, tuple[Axis, ...]], channels_K: Tensor, corrections: ReadCorrections
) -> dict[str, Tensor]:
    state = dict(parts.model.state_dict())
    for name, value in state.items():
        module_name, _, kind = name.rpartition(".")
        if kind == "weight" and module_name in corrections.maps:
            state[name] = (value.float() @ corrections.maps[module_name].to(value.device)).to(value.dtype)
            continue
        state[name] = _sliced(value, axes[name], "channels", channels_K)
        if kind == "weight" and module_name in corrections.norm_scales:
            norm = parts.model.get_submodule(module_name)
            state[name] = scaled_weight(norm, state[name], corrections.norm_scales[module_name])
    return state


@torch.no_grad()
def restore_embedding_scale(student: PreTrainedModel, teacher: ModelParts) -> None:
    """Let embeddings enter the stream as large as they did: Gemma multiplies them by the root of its width."""
    parts = take_apart(student)
    ratio = _embedding_scale(teacher) / _embedding_scale(parts)
    if abs(ratio - 1.0) < 1e-4:
        return
    student.get_submodule(embedding_name(parts)).weight.mul_(ratio)
    if is_tied(parts):
        norm = cast("Any", student.get_submodule(final_norm_name(parts)))
        norm.weight.copy_(scaled_weight(norm, norm.weight, 1.0 / ratio))


def _embedding_scale(parts: ModelParts) -> float:
    """Return what the model multiplies its embeddings by before its first block."""
    entered: list[Tensor] = []
    handle = parts.blocks[0].register_forward_pre_hook(lambda _module, args: entered.append(args[0]))
    try:
        ids = torch.arange(4, device=next(parts.model.parameters()).device).unsqueeze(0)
        parts.body(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    weight = parts.model.get_input_embeddings().weight[:4].float()
    return float((entered[0][0].float() * weight).sum() / weight.square().sum())


def _span(weight: Tensor) -> Tensor:
    weight = weight.float()
    return weight.max(dim=1).values + weight.min(dim=1).values.abs()


def _sliced(value: Tensor, axes: tuple[Axis, ...], axis: Axis, kept: Tensor) -> Tensor:
    for dim, name in enumerate(axes):
        if name == axis:
            value = value.index_select(dim, kept.to(value.device))
    return value.contiguous()
