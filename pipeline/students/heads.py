"""Cut a model's attention heads: whole groups of a key-value head with the query heads that read it, as many a block.

Shapes: N positions, D channels, G key-value heads, S inputs of the output projection that one group gives.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from coldstill.pipeline.models import ModelParts, text_config
from coldstill.pipeline.models.forward import padded_batches
from coldstill.pipeline.runtime.errors import ModelError
from coldstill.pipeline.students.axes import ATTENTION_OUTPUT, HEAD_NORMS, Axis, parameter_axes, weight_of
from coldstill.pipeline.students.model_copies import changed_config, model_from_state


def num_groups(config: PreTrainedConfig) -> int:
    """Return how many key-value heads each block's attention has, by a config of a language model.

    Raises:
        ModelError: It says of no heads.
    """
    of_text = text_config(config)
    found = getattr(of_text, "num_key_value_heads", None) or getattr(of_text, "num_attention_heads", None)
    if found is None:
        raise ModelError(f"{type(config).__name__} names no number of attention heads, so none are cut")
    return int(found)


def groups_kept(share: float, groups: int) -> int:
    """Return how many of so many groups a share is: the nearest number, and at least one."""
    return max(1, round(share * groups))


@torch.inference_mode()
def group_importances(parts: ModelParts, rows: Sequence[Tensor]) -> list[Tensor]:
    """Return each block's importances of its key-value groups, [G]: the norm of what a group writes to the stream.

    The root of the sum, over the rows' positions, of the squared norm of what the output projection makes of the
    group's heads; as `coldstill.pipeline.students.width.neuron_importances` weighs neurons, but with what heads have
    in common.

    Args:
        parts: The model.
        rows: Calibration rows of token ids, [T] each.

    Raises:
        ModelError: A block is not built as `coldstill.pipeline.students.axes` knows it.
    """
    _check_heads(parts, parameter_axes(parts))
    groups = num_groups(parts.model.config)
    weights = [weight_of(block, ATTENTION_OUTPUT) for block in parts.blocks]
    squares = [torch.zeros(groups, dtype=torch.float64, device=weight.device) for weight in weights]
    handles = []
    mask_BT = torch.empty(0)
    for block, weight, total_G in zip(parts.blocks, weights, squares, strict=True):

        def add(_module: object, args: tuple[Tensor, ...], weight: Tensor = weight, total_G: Tensor = total_G) -> None:
            of_groups = args[0][mask_BT].chunk(groups, dim=-1)
            for group, (read_NS, weight_DS) in enumerate(zip(of_groups, weight.chunk(groups, dim=1), strict=True)):
                total_G[group] += (read_NS @ weight_DS.T).double().square().sum()

        handles.append(block.get_submodule(ATTENTION_OUTPUT).register_forward_pre_hook(add))
    try:
        for ids_BT, mask_BT in padded_batches(rows, parts.model):
            parts.body(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [total_G.sqrt() for total_G in squares]


@torch.no_grad()
def narrow_heads(parts: ModelParts, groups: Sequence[Tensor]) -> PreTrainedModel:
    """Make the model whose blocks keep only some key-value groups, as many in each; the original is left as it was.

    Heads keep their width, which the config says from then on.

    Args:
        parts: The original.
        groups: Of each block, the groups that it keeps, ascending.

    Raises:
        ModelError: The model is not built as `coldstill.pipeline.students.axes` knows it, or does not allow the number.
    """
    axes = parameter_axes(parts)
    _check_heads(parts, axes)
    of_text, whole = text_config(parts.model.config), num_groups(parts.model.config)
    prefix = f"{parts.blocks_name}."
    state = parts.model.state_dict()
    for name, of_value in axes.items():
        for dim, axis in enumerate(of_value):
            if axis in ("queries", "keys"):
                kept = groups[int(name.removeprefix(prefix).partition(".")[0])]
                state[name] = _kept_groups(state[name], dim, whole, kept)
    config = changed_config(
        parts.model.config,
        num_attention_heads=of_text.num_attention_heads // whole * len(groups[0]),
        num_key_value_heads=len(groups[0]),
        head_dim=parts.head_dim,
    )
    return model_from_state(config, state, like=parts.model)


def _kept_groups(value: Tensor, dim: int, whole: int, kept: Tensor) -> Tensor:
    """Slice an axis that lies group by group."""
    by_group = value.unflatten(dim, (whole, -1)).index_select(dim, kept.to(value.device))
    return by_group.flatten(dim, dim + 1).contiguous()


def _check_heads(parts: ModelParts, axes: dict[str, tuple[Axis, ...]]) -> None:
    """Refuse a model whose heads do not lie as its config says, or do not stand each for itself."""
    what = f"the heads of {type(parts.model).__name__} are not cut"
    lengths = {
        "queries": text_config(parts.model.config).num_attention_heads * parts.head_dim,
        "keys": num_groups(parts.model.config) * parts.head_dim,
    }
    for name, value in parts.model.state_dict().items():
        within = name.rpartition(".")[0]
        if within.endswith(HEAD_NORMS) and len(value) != parts.head_dim:
            raise ModelError(f"{what}: {name} norms all of a block's heads together")
        for size, axis in zip(value.shape, axes[name], strict=True):
            if axis in lengths and size != lengths[axis]:
                raise ModelError(f"{what}: {name} has {size} values along its heads, its config says {lengths[axis]}")
