"""A smaller model whose weights lie between a larger one's: linearly interpolated along depth and width.

Shapes: as `coldstill.pipeline.students.axes` names a weight's axes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from coldstill.pipeline.models import KEPT_BLOCKS, ModelParts
from coldstill.pipeline.students.axes import Axis, parameter_axes
from coldstill.pipeline.students.depth import deep_config
from coldstill.pipeline.students.designs import Design, block_positions
from coldstill.pipeline.students.model_copies import changed_config, model_from_state
from coldstill.pipeline.students.width import restore_embedding_scale


@torch.no_grad()
def interpolate(parts: ModelParts, design: Design) -> PreTrainedModel:
    """Make a model of a design from weights between those of the original, which is left as it was.

    Block b of n_s lies at b (n_t - 1) / (n_s - 1) among the original's blocks; channels and neurons alike lie evenly
    spaced among the original's, ends on ends.

    Raises:
        ModelError: The model is not built as `coldstill.pipeline.students.axes` knows it, or does not allow the
            design's width.
    """
    axes = parameter_axes(parts)
    positions = block_positions(len(parts.blocks), design.num_blocks)
    prefix = f"{parts.blocks_name}."
    source = parts.model.state_dict()
    state = {name: _resized(value, axes[name], design) for name, value in source.items() if not name.startswith(prefix)}
    names = [name.removeprefix(f"{prefix}0.") for name in source if name.startswith(f"{prefix}0.")]
    for block, position in enumerate(positions):
        for name in names:
            between = _between(source, prefix, name, position)
            state[f"{prefix}{block}.{name}"] = _resized(between, axes[f"{prefix}0.{name}"], design)
    student = model_from_state(_config(parts, design, positions), state, like=parts.model)
    restore_embedding_scale(student, parts)
    return student


def _config(parts: ModelParts, design: Design, positions: Sequence[float]) -> PreTrainedConfig:
    config = deep_config(parts.model.config, [round(position) for position in positions])
    delattr(config, KEPT_BLOCKS)  # no block was kept
    return changed_config(
        config, hidden_size=design.hidden_size, intermediate_size=design.mlp_size, head_dim=parts.head_dim
    )


def _between(state: dict[str, Tensor], prefix: str, name: str, position: float) -> Tensor:
    lower, upper = math.floor(position), math.ceil(position)
    return torch.lerp(state[f"{prefix}{lower}.{name}"], state[f"{prefix}{upper}.{name}"], position - lower)


def _resized(value: Tensor, axes: tuple[Axis, ...], design: Design) -> Tensor:
    sizes: dict[Axis, int] = {"channels": design.hidden_size, "neurons": design.mlp_size}
    for dim, axis in enumerate(axes):
        if axis in sizes:  # heads keep their number and width
            value = stretched(value, dim, sizes[axis])
    return value


def stretched(value: Tensor, dim: int, size: int) -> Tensor:
    """Interpolate linearly along an axis to another size, ends on ends."""
    positions = torch.linspace(0, value.shape[dim] - 1, size, device=value.device, dtype=torch.float64)
    lower = positions.floor().long().clamp(max=value.shape[dim] - 1)
    upper = (lower + 1).clamp(max=value.shape[dim] - 1)
    shape = [-1 if index == dim else 1 for index in range(value.dim())]
    share = (positions - lower).to(value.dtype).view(shape)
    return torch.lerp(value.index_select(dim, lower), value.index_select(dim, upper), share)
