"""What a config says of its blocks one by one, said again for those that a cut keeps.

Configs tell the kinds of blocks by lists with an entry for each block, lists of block indices, numbers of first or last
blocks, and periods with an offset. Their keys are listed here by name; whether the model that comes of them is the
right one is not decided here, but by comparing it with the original (`coldstill.pipeline.students.cut_check`).
"""

import math
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from typing import Any

# How many there are, beside `num_hidden_layers`.
_NUMBERS = ("num_blocks", "num_layers", "n_layer", "n_layers")
# Lists of indices of blocks.
_INDICES = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "hybrid_layer_ids")
# How many of the first blocks are of a kind, and how many of the last ones.
_FIRST = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")
_LAST = ("num_kv_shared_layers",)
# Block i is of a kind where i % period is the offset.
_PERIODS = (("attn_layer_period", "attn_layer_offset"), ("expert_layer_period", "expert_layer_offset"))
# Lists that may be as long as there are blocks, and tell nothing of them.
_NOT_OF_BLOCKS = (
    "architectures",
    "kept_blocks",
    "kept_channels",
    "time_step_limit",
    "ssm_multipliers",
    "mlp_multipliers",
)

Values = Mapping[str, Any]


def cut_patterns(values: Values, kept_blocks: Sequence[int], *, num_blocks: int) -> dict[str, Any]:
    """Return what changes in a config when only some of its blocks are kept.

    Args:
        values: The config of the language model as a dictionary.
        kept_blocks: Which are kept, ascending.
        num_blocks: How many there are.

    Returns:
        New values by key. A pattern that its keys cannot say of the kept blocks stays as it was.
    """
    changes: dict[str, Any] = {"num_hidden_layers": len(kept_blocks)}
    for key, value in values.items():
        if key in _NUMBERS and value == num_blocks:
            changes[key] = len(kept_blocks)
        elif key in _INDICES and value is not None:
            changes[key] = [kept_blocks.index(block) for block in value if block in kept_blocks]
        elif key in _FIRST and value is not None and value < num_blocks:
            changes[key] = bisect_left(kept_blocks, value)
        elif key in _LAST and value is not None:
            changes[key] = len(kept_blocks) - bisect_left(kept_blocks, num_blocks - value)
        elif _is_of_blocks(key, value, num_blocks):
            changes[key] = [value[block] for block in kept_blocks]
    for rewrite in (_sparse_steps, _moe_interval, _periods, _repeated_kinds, _block_configs):
        changes |= rewrite(values, kept_blocks)
    if values.get("scale_depth") is not None:  # MiniCPM divides what a block adds by the root of the number of blocks
        changes["scale_depth"] = values["scale_depth"] * math.sqrt(len(kept_blocks) / num_blocks)
    return changes


def period_keys(values: Values) -> list[str]:
    """Name what of a config says by a period which block is of which kind; a cut may leave no period."""
    keys = [key for keys in (*_PERIODS, ("moe_layer_interval",)) for key in keys]
    return [key for key in keys if values.get(key) is not None]


def _is_of_blocks(key: str, value: Any, num_blocks: int) -> bool:
    if key in _NOT_OF_BLOCKS or key.startswith("mtp_") or key.endswith("token_id"):
        return False
    return isinstance(value, list | tuple) and len(value) == num_blocks


def _sparse_steps(values: Values, kept_blocks: Sequence[int]) -> dict[str, Any]:
    """Qwen's mixtures: every so many blocks is sparse, but for those of a list. The list alone can say any pattern."""
    step, dense = values.get("decoder_sparse_step"), values.get("mlp_only_layers")
    if not step or dense is None:
        return {}
    is_dense = [block in dense or (block + 1) % step != 0 for block in kept_blocks]
    return {"decoder_sparse_step": 1, "mlp_only_layers": [new for new, dense in enumerate(is_dense) if dense]}


def _moe_interval(values: Values, kept_blocks: Sequence[int]) -> dict[str, Any]:
    """Ernie's mixtures: from a first to a last block, every so many."""
    interval = values.get("moe_layer_interval")
    if interval is None:
        return {}
    start, end = values["moe_layer_start_index"], values["moe_layer_end_index"]
    wanted = [new for new, block in enumerate(kept_blocks) if start <= block <= end and (block + 1) % interval == 0]
    first, last = (wanted[0], wanted[-1]) if wanted else (len(kept_blocks), len(kept_blocks))
    for other in range(1, len(kept_blocks) + 1):
        if [index for index in range(first, last + 1) if (index + 1) % other == 0] == wanted or not wanted:
            return {"moe_layer_interval": other, "moe_layer_start_index": first, "moe_layer_end_index": last}
    return {}


def _periods(values: Values, kept_blocks: Sequence[int]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for period_key, offset_key in _PERIODS:
        period, offset = values.get(period_key), values.get(offset_key)
        if period is None or offset is None:
            continue
        wanted = [new for new, block in enumerate(kept_blocks) if block % period == offset]
        found = _period_of(wanted, len(kept_blocks))
        if found is not None:
            changes |= {period_key: found[0], offset_key: found[1]}
    return changes


def _repeated_kinds(values: Values, kept_blocks: Sequence[int]) -> dict[str, Any]:
    """Kinds that are repeated over the blocks: of RecurrentGemma until there are enough, of GPT-Neo so many times."""
    changes: dict[str, Any] = {}
    if isinstance(kinds := values.get("block_types"), list | tuple):
        changes["block_types"] = [kinds[block % len(kinds)] for block in kept_blocks]
    if "attention_types" in values and isinstance(kinds := values.get("attention_layers"), list):
        changes["attention_types"] = [[[kinds[block] for block in kept_blocks], 1]]
    return changes


def _block_configs(values: Values, kept_blocks: Sequence[int]) -> dict[str, Any]:
    """Values of single blocks, by index."""
    of_blocks = values.get("per_layer_config")
    if not of_blocks:
        return {}
    by_block = {int(block): of_block for block, of_block in of_blocks.items()}
    return {
        "per_layer_config": {str(new): by_block[block] for new, block in enumerate(kept_blocks) if block in by_block}
    }


def _period_of(wanted: Collection[int], num_blocks: int) -> tuple[int, int] | None:
    """Return a period and an offset that pick exactly the wanted of so many indices; None where none do."""
    for period in range(1, num_blocks + 2):
        for offset in range(period):
            if [index for index in range(num_blocks) if index % period == offset] == list(wanted):
                return period, offset
    return None
