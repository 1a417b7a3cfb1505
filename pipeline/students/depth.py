"""Cut a model in depth: which decoder blocks go, and the model that remains.

Knows models and tensors; where a pruned student is kept is the stages' business.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from coldstill.pipeline.models import KEPT_BLOCKS, ModelParts, text_config
from coldstill.pipeline.models.forward import block_input, block_output, padded_batches
from coldstill.pipeline.recipe.student import PruneLayersConfig
from coldstill.pipeline.runtime.errors import ModelError, RecipeError
from coldstill.pipeline.students.cut_check import OTHER_CUTS, check_cut, load_weights, warn_without_cache
from coldstill.pipeline.students.cut_weights import cut_weights
from coldstill.pipeline.students.layer_patterns import cut_patterns
from coldstill.pipeline.students.model_copies import changed_config, empty_model, reread_config


def check_prune(layers: PruneLayersConfig, *, num_blocks: int) -> None:
    """Refuse, before any work, to remove blocks that a teacher of so many blocks does not have.

    Raises:
        RecipeError: A block does not exist, or none would be left.
    """
    beyond = [block for block in layers.blocks or [] if block >= num_blocks]
    if beyond:
        raise RecipeError(
            f"student.prune.layers.blocks names block {beyond[0]}; the teacher has blocks 0 to {num_blocks - 1}"
        )
    removed = num_removed(layers)
    if removed >= num_blocks:
        raise RecipeError(f"student.prune.layers removes {removed} of the teacher's {num_blocks} blocks: none is left")


def num_removed(layers: PruneLayersConfig) -> int:
    """Return how many blocks go."""
    return len(layers.blocks) if layers.blocks else layers.remove or 0


def choose_kept_blocks(
    layers: PruneLayersConfig,
    *,
    num_blocks: int,
    importances: Sequence[float] | None = None,
    cheapest: Sequence[int] | None = None,
) -> list[int]:
    """Return the blocks that stay, in order.

    Args:
        layers: What to remove.
        num_blocks: Of the teacher.
        importances: One a block, for method `importance`; the least important go, of equal ones the later.
        cheapest: For method `kl`: the blocks that go (`coldstill.pipeline.students.cut_costs`).
    """
    if layers.method == "explicit":
        removed = set(layers.blocks or [])
    elif layers.method == "first":
        removed = set(range(layers.remove or 0))
    elif layers.method == "last":
        removed = set(range(num_blocks - (layers.remove or 0), num_blocks))
    elif layers.method == "kl":
        assert cheapest is not None
        removed = set(cheapest)
    else:
        assert importances is not None
        by_importance = sorted(range(num_blocks), key=lambda block: (importances[block], -block))
        removed = set(by_importance[: layers.remove])
    return [block for block in range(num_blocks) if block not in removed]


@torch.inference_mode()
def block_importances(parts: ModelParts, rows: Sequence[Tensor]) -> list[float]:
    """Measure each block's influence: one minus the mean cosine of its input and its output over the rows' positions.

    Block Influence of ShortGPT (Men et al., arXiv 2403.03853, equation 1). A block that hardly turns the residual
    stream is missed least.

    Args:
        parts: The model.
        rows: Calibration rows of token ids, [T] each.
    """
    totals = torch.zeros(len(parts.blocks), dtype=torch.float64)
    num_positions = 0
    for ids_BT, mask_BT in padded_batches(rows, parts.model):
        totals += _influences(parts, ids_BT, mask_BT)
        num_positions += int(mask_BT.sum())
    return (totals / num_positions).tolist()


def cut_blocks(parts: ModelParts, kept_blocks: Sequence[int]) -> PreTrainedModel:
    """Make the model that has only some of the decoder blocks; the original is left as it was.

    What the config says of its blocks one by one is said of those that were kept, and it names them. The model is
    compared with the original.

    Raises:
        ModelError: A block would not compute what it did in the original.
    """
    config = deep_config(parts.model.config, kept_blocks)
    student = empty_model(config, like=parts.model)
    load_weights(parts, student, cut_weights(parts, kept_blocks, student), kept_blocks)
    check_cut(parts, student, kept_blocks)
    warn_without_cache(parts, student)
    return student


def _influences(parts: ModelParts, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    influences = torch.zeros(len(parts.blocks), dtype=torch.float64)
    handles = []
    for index, block in enumerate(parts.blocks):

        def measure(_module: object, args: Any, kwargs: Any, output: object, index: int = index) -> None:
            # Gemma 3n keeps several streams, along an axis in front.
            before, after = (
                stream[..., mask_BT, :].float() for stream in (block_input(args, kwargs), block_output(output))
            )
            turned_N = 1.0 - F.cosine_similarity(before, after, dim=-1)
            influences[index] = turned_N.double().reshape(-1, turned_N.shape[-1]).mean(dim=0).sum().cpu()

        handles.append(block.register_forward_hook(measure, with_kwargs=True))
    try:
        parts.body(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return influences


def deep_config(config: PreTrainedConfig, kept_blocks: Sequence[int]) -> PreTrainedConfig:
    """Return the config of a model that has only some of the blocks; it names the ones that were kept.

    Raises:
        ModelError: The architecture does not allow these blocks.
    """
    of_text = text_config(config)
    changes = cut_patterns(of_text.to_dict(), kept_blocks, num_blocks=of_text.num_hidden_layers)
    cut = reread_config(changed_config(config, **changes))
    reread = text_config(cut)
    for key, value in changes.items():
        read = _as_json(reread.to_dict().get(key, getattr(reread, key)))
        if read != _as_json(value):
            raise ModelError(
                f"{type(reread).__name__} cannot say {key} of blocks {', '.join(map(str, kept_blocks))} alone: "
                f"{_as_json(value)} would be read as {read}; {OTHER_CUTS}"
            )
    setattr(cut, KEPT_BLOCKS, list(kept_blocks))
    return cut


def _as_json(value: Any) -> str:
    return json.dumps(value, default=list)
