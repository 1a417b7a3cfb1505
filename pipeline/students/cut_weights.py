"""The weights of a model that has only some of another's blocks, by name.

Most are taken as they are. What is mended is what depends on a block's index or on the number of blocks, where there is
an exact mend.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coldstill.pipeline.models import ModelParts, text_config


@torch.no_grad()
def cut_weights(parts: ModelParts, kept_blocks: Sequence[int], student: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights of a model that keeps some blocks; those of the original stay as they are.

    Args:
        parts: The original.
        kept_blocks: Which blocks are kept, ascending.
        student: The model that is to have the weights; only what it is made of is read.
    """
    shapes = {name: value.shape for name, value in student.state_dict().items()}
    blocks: Any = student.get_submodule(parts.blocks_name)
    prefix = f"{parts.blocks_name}."
    weights = {
        name: _of_kept_blocks(value, kept_blocks, len(parts.blocks), shapes.get(name))
        for name, value in parts.model.state_dict().items()
        if not name.startswith(prefix)
    }
    for index, block in enumerate(kept_blocks):
        parts.bring(block)
        of_block: dict[str, Tensor] = parts.blocks[block].state_dict()
        of_block |= _same_scores(of_block, parts.blocks[block], blocks[index])
        of_block |= _same_lambda(of_block, parts.blocks[block], blocks[index])
        of_block = _own_adapters(of_block, text_config(parts.model.config), kept_blocks)
        weights |= {f"{prefix}{index}.{name}": value for name, value in of_block.items()}
    for name, shape in shapes.items():
        if name not in weights and name.startswith(prefix) and name.endswith("bias"):
            # GPT-NeoX Japanese gives a bias to its last block alone. Zeros leave the one that is last now as it was.
            weights[name] = torch.zeros(shape, dtype=student.dtype, device=student.device)
    return weights


def _same_scores(weights: dict[str, Tensor], block: Any, cut: Any) -> dict[str, Tensor]:
    """GPT-2 may divide attention scores by the block's index plus one: let the queries make up for another index."""
    if "attn.c_attn.weight" not in weights or not hasattr(block.attn, "scaling"):
        return {}
    mended = {name: weights[name].clone() for name in ("attn.c_attn.weight", "attn.c_attn.bias")}
    for value in mended.values():  # query, key and value, along the last axis
        value[..., : value.shape[-1] // 3] *= block.attn.scaling / cut.attn.scaling
    return mended


def _same_lambda(weights: dict[str, Tensor], block: Any, cut: Any) -> dict[str, Tensor]:
    """DiffLlama's attention is (1 - i) (a - (exp(q k) - ... + i) b), and i depends on the block's index.

    Let q make up for what is added, and the matrix behind it for the factor.
    """
    if "self_attn.lambda_q1" not in weights or block.self_attn.lambda_init == cut.self_attn.lambda_init:
        return {}
    q, k = (weights[f"self_attn.lambda_{name}1"].double() for name in "qk")
    before, after = block.self_attn.lambda_init, cut.self_attn.lambda_init
    wanted = torch.log(torch.exp(q @ k) + before - after)
    output = weights["self_attn.o_proj.weight"]
    return {
        "self_attn.lambda_q1": (q + k * (wanted - q @ k) / (k @ k)).to(output.dtype),
        "self_attn.o_proj.weight": output * ((1 - before) / (1 - after)),
    }


def _own_adapters(weights: dict[str, Tensor], config: Any, kept_blocks: Sequence[int]) -> dict[str, Tensor]:
    """Zamba 2 shares a block among several, with a list of adapters in it that has an entry for each of them."""
    sharing: Sequence[int] | None = getattr(config, "hybrid_layer_ids", None)
    if sharing is None:
        return weights
    places = {block: place for place, block in enumerate(block for block in kept_blocks if block in sharing)}
    own = {}
    for name, value in weights.items():
        before, found, after = name.partition("adapter_list.")
        place, _, rest = after.partition(".")
        if not found:
            own[name] = value
        elif sharing[int(place)] in places:
            own[f"{before}{found}{places[sharing[int(place)]]}.{rest}"] = value
    return own


def _of_kept_blocks(value: Tensor, kept_blocks: Sequence[int], num_blocks: int, shape: torch.Size | None) -> Tensor:
    """Gemma 3n has, outside its blocks, matrices with a part for each block along one axis."""
    if shape is None or len(shape) != value.dim():
        return value
    for axis, (whole, cut) in enumerate(zip(value.shape, shape, strict=True)):
        if whole != cut and whole * len(kept_blocks) == cut * num_blocks:
            kept = torch.tensor(kept_blocks, device=value.device)
            value = value.unflatten(axis, (num_blocks, -1)).index_select(axis, kept).flatten(axis, axis + 1)
    return value
