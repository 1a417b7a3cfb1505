"""Chosen tokens of a distribution to stored arrays and back: the largest logits, and draws from the tail.

Token ids are split into byte planes: the high byte of a frequent token is nearly always small, and compresses alone.
Logits are offsets from the row's maximum in whole steps. Each form states its error in the column's attributes.
Shapes: N positions, K stored tokens, M draws, V vocabulary.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from coldstill.cache.columns import ArraySpec, Column

Arrays = dict[str, Tensor]

# Nats between neighbouring stored logits: an error of at most half of it.
LOGIT_STEP = 0.02
_LARGEST_STEPS = 65535


def topk_column(name: str, *, k: int, values: str, vocab_size: int) -> Column:
    """Describe the column that `encode_topk` fills.

    Args:
        name: The column's name.
        k: How many logits a position.
        values: `delta`, in whole steps, or `float32`, exactly.
        vocab_size: V.
    """
    order = "by logit, descending: a prefix is the top-k of a smaller k"
    attributes = {"k": k, "order": order, "ids": _IDS}
    ids = _id_arrays(k, vocab_size)
    if values == "float32":
        return Column(name, {**ids, "values": ArraySpec("float32", (k,))}, {**attributes, "error": "none"})
    gaps = {"gaps_0": ArraySpec("uint8", (k,)), "gaps_1": ArraySpec("uint8", (k,)), "maximum": ArraySpec("float32")}
    decode = f"maximum - {LOGIT_STEP:g} * cumulative sum of (gaps_0 + 256 * gaps_1)"
    return Column(name, {**ids, **gaps}, {**attributes, "decode": decode, "error": _ERROR})


def encode_topk(top_logits_NK: Tensor, top_ids_NK: Tensor, *, column: Column) -> Arrays:
    """Encode the largest logits, float32 and in descending order, with their token ids.

    Raises:
        OverflowError: Two neighbouring logits are more than 1,310 nats apart.
    """
    ids = _split_ids(top_ids_NK, column)
    if "values" in column.arrays:
        return {**ids, "values": top_logits_NK}
    maximum_N1 = top_logits_NK[:, :1]
    steps_NK = _whole_steps(maximum_N1 - top_logits_NK)
    gaps_NK = steps_NK.diff(dim=1, prepend=torch.zeros_like(steps_NK[:, :1]))
    _check_steps(gaps_NK)
    return {**ids, "gaps_0": _byte(gaps_NK, 0), "gaps_1": _byte(gaps_NK, 1), "maximum": maximum_N1.squeeze(1)}


def decode_topk(arrays: Mapping[str, Tensor], *, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest logits in float32 and their ids in int64, each [..., K], from a column of k or more."""
    ids = _join_bytes(arrays, "ids")[..., :k]
    if "values" in arrays:
        return arrays["values"][..., :k], ids
    steps = _join_bytes(arrays, "gaps")[..., :k].cumsum(dim=-1)
    return arrays["maximum"].unsqueeze(-1) - LOGIT_STEP * steps, ids


def tail_column(name: str, *, num_draws: int, vocab_size: int) -> Column:
    """Describe the column that `encode_tail` fills."""
    arrays = {
        **_id_arrays(num_draws, vocab_size),
        "offsets_0": ArraySpec("uint8", (num_draws,)),
        "offsets_1": ArraySpec("uint8", (num_draws,)),
        "log_weights": ArraySpec("float16", (num_draws,)),
        "maximum": ArraySpec("float32"),
    }
    decode = f"maximum - {LOGIT_STEP:g} * (offsets_0 + 256 * offsets_1); a draw counts exp(log_weights) times"
    return Column(name, arrays, {"draws": num_draws, "ids": _IDS, "decode": decode, "error": _ERROR})


def encode_tail(logits_NM: Tensor, ids_NM: Tensor, log_weights_NM: Tensor, *, column: Column) -> Arrays:
    """Encode draws from the tail: logits in float32, token ids, and the logarithm of each draw's importance weight.

    Raises:
        OverflowError: A position's logits are more than 1,310 nats apart.
    """
    maximum_N1 = logits_NM.amax(dim=1, keepdim=True)
    steps_NM = _whole_steps(maximum_N1 - logits_NM)
    _check_steps(steps_NM)
    return {
        **_split_ids(ids_NM, column),
        "offsets_0": _byte(steps_NM, 0),
        "offsets_1": _byte(steps_NM, 1),
        "log_weights": log_weights_NM.to(torch.float16),
        "maximum": maximum_N1.squeeze(1),
    }


def decode_tail(arrays: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the draws' logits and log-weights in float32 and their ids in int64, each [..., M]."""
    logits = arrays["maximum"].unsqueeze(-1) - LOGIT_STEP * _join_bytes(arrays, "offsets")
    return logits, _join_bytes(arrays, "ids"), arrays["log_weights"].float()


_IDS = "ids_0 + 256 * ids_1 + 65536 * ids_2, those planes that are there"
_ERROR = f"at most {LOGIT_STEP / 2:g} nats, and float32 rounding"


def _id_arrays(count: int, vocab_size: int) -> dict[str, ArraySpec]:
    num_planes = max(1, ((vocab_size - 1).bit_length() + 7) // 8)
    return {f"ids_{plane}": ArraySpec("uint8", (count,)) for plane in range(num_planes)}


def _split_ids(ids: Tensor, column: Column) -> Arrays:
    planes = sorted(name for name in column.arrays if name.startswith("ids_"))
    return {name: _byte(ids, plane) for plane, name in enumerate(planes)}


def _join_bytes(arrays: Mapping[str, Tensor], name: str) -> Tensor:
    """Return whole numbers, int64, from their byte planes."""
    joined = arrays[f"{name}_0"].long()
    plane = 1
    while f"{name}_{plane}" in arrays:
        joined += arrays[f"{name}_{plane}"].long() << (8 * plane)
        plane += 1
    return joined


def _byte(numbers: Tensor, plane: int) -> Tensor:
    return ((numbers >> (8 * plane)) & 255).to(torch.uint8)


def _whole_steps(offsets: Tensor) -> Tensor:
    return (offsets / LOGIT_STEP).round().long()


def _check_steps(steps: Tensor) -> None:
    if int(steps.max()) > _LARGEST_STEPS:
        raise OverflowError(f"logits {int(steps.max()) * LOGIT_STEP:.4g} nats apart are beyond 65,535 steps of 0.02")
