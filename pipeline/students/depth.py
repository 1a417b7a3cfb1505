"""Cut a model in depth: which decoder blocks go, and the model that remains.

Knows models and tensors; where a pruned student is kept is the stages' business.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from cache.errors import RecipeError
from pipeline.forward import block_output, padded_batches
from pipeline.models import KEPT_BLOCKS, KEPT_CHANNELS, ModelParts, text_config
from pipeline.student_config import PruneLayersConfig
from pipeline.students.model_copies import changed_config, model_from_state

_KEPT = (KEPT_BLOCKS, KEPT_CHANNELS)


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
    """Give how many blocks go."""
    return len(layers.blocks) if layers.blocks else layers.remove or 0


def choose_kept_blocks(
    layers: PruneLayersConfig, *, num_blocks: int, importances: Sequence[float] | None = None
) -> list[int]:
    """Give the blocks that stay, in order.

    Args:
        layers: What to remove.
        num_blocks: Of the teacher.
        importances: One a block, for method `importance`; the least important go, of equal ones the later.
    """
    if layers.method == "explicit":
        removed = set(layers.blocks or [])
    elif layers.method == "first":
        removed = set(range(layers.remove or 0))
    elif layers.method == "last":
        removed = set(range(num_blocks - (layers.remove or 0), num_blocks))
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

    Every list of the config that has an entry for each block, such as `layer_types`, is cut with them, and the config
    names the blocks that were kept.
    """
    config = deep_config(parts.model.config, kept_blocks)
    renumbered = {old: new for new, old in enumerate(kept_blocks)}
    prefix = f"{parts.blocks_name}."
    state = {}
    for name, value in parts.model.state_dict().items():
        if name.startswith(prefix):
            block, _, rest = name.removeprefix(prefix).partition(".")
            if int(block) not in renumbered:
                continue
            name = f"{prefix}{renumbered[int(block)]}.{rest}"
        state[name] = value
    return model_from_state(config, state, like=parts.model)


def _influences(parts: ModelParts, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    influences = torch.zeros(len(parts.blocks), dtype=torch.float64)
    handles = []
    for index, block in enumerate(parts.blocks):

        def measure(_module: object, args: tuple[Tensor, ...], output: object, index: int = index) -> None:
            before, after = args[0][mask_BT].float(), block_output(output)[mask_BT].float()
            influences[index] = (1.0 - F.cosine_similarity(before, after, dim=-1)).double().sum().cpu()

        handles.append(block.register_forward_hook(measure))
    try:
        parts.body(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return influences


def deep_config(config: PreTrainedConfig, kept_blocks: Sequence[int]) -> PreTrainedConfig:
    """Give the config of a model that has only some of the blocks; it names the ones that were kept."""
    of_text = text_config(config)
    num_blocks = of_text.num_hidden_layers
    lists = {
        key: [value[block] for block in kept_blocks]
        for key, value in of_text.to_dict().items()
        if isinstance(value, list) and len(value) == num_blocks and hasattr(of_text, key) and key not in _KEPT
    }
    cut = changed_config(config, num_hidden_layers=len(kept_blocks), **lists)
    setattr(cut, KEPT_BLOCKS, list(kept_blocks))
    return cut
