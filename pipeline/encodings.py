"""Tensors to stored arrays and back: the numeric forms of targets, lossy or not, on the tensor's own device.

Each form states its error in the column's attributes; a test holds the error to it.
Shapes: B rows, T positions, N positions of all rows, K stored tokens, V vocabulary, D width.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from cache.columns import ArraySpec, Column

Arrays = dict[str, Tensor]

_INT8_LEVELS = 127
# A position whose norm is this many times the median's is an attention sink: it is stored, but sets no statistics.
_SINK_RATIO = 10.0
_SMALLEST_SPREAD = 1e-6
_UINT16_IDS = 1 << 16


def hidden_column(name: str, *, encoding: str, width: int) -> Column:
    """Describe the column that `encode_hidden` fills."""
    if encoding == "int8":
        arrays = {
            "values": ArraySpec("int8", (width,)),
            "scale": ArraySpec("float32"),
            "centre": ArraySpec("float32", (width,), axis="shard"),
            "spread": ArraySpec("float32", (width,), axis="shard"),
        }
        error = "at most 0.5 * scale * spread, and float32 rounding"
        return Column(
            name, arrays, {"encoding": encoding, "decode": "centre + spread * scale * values", "error": error}
        )
    stored = {"float16": "float16", "float32": "float32", "bfloat16": "uint16"}[encoding]
    error = {"float16": "2**-11 of the value", "bfloat16": "2**-8 of the value", "float32": "none"}[encoding]
    attributes = {"encoding": encoding, "error": error}
    if encoding == "bfloat16":
        attributes["decode"] = "the 16 bits are the upper half of a float32"
    return Column(name, {"values": ArraySpec(stored, (width,))}, attributes)


def encode_hidden(state_ND: Tensor, *, encoding: str) -> Arrays:
    """Encode the hidden states of a whole shard, [N, D] in any floating dtype.

    int8: every channel is centred and divided by its spread over the shard, then each position is scaled so that its
    largest channel is 127. Both matter: channels differ in scale by orders of magnitude, and so do positions.

    Raises:
        OverflowError: A value is beyond float16's range; bfloat16 or int8 hold it.
    """
    if encoding == "int8":
        return _encode_int8(state_ND.float())
    if encoding == "float16":
        return {"values": _to_float16(state_ND)}
    if encoding == "bfloat16":
        return {"values": state_ND.to(torch.bfloat16).view(torch.uint16)}
    return {"values": state_ND.float()}


def decode_hidden(arrays: Mapping[str, Tensor]) -> Tensor:
    """Give hidden states in float32, [..., T, D], from arrays of `[..., T, D]`, `[..., T]` and `[..., D]`."""
    values = arrays["values"]
    if "scale" in arrays:
        standardised = values.float() * arrays["scale"].unsqueeze(-1)
        return standardised * arrays["spread"].unsqueeze(-2) + arrays["centre"].unsqueeze(-2)
    if values.dtype == torch.uint16:
        return values.view(torch.bfloat16).float()
    return values.float()


def topk_column(name: str, *, k: int, values: str, vocab_size: int) -> Column:
    """Describe the column that `encode_topk` fills."""
    ids = ArraySpec("uint16" if vocab_size <= _UINT16_IDS else "uint32", (k,))
    order = "by logit, descending: a prefix is the top-k of a smaller k"
    if values == "float32":
        return Column(
            name, {"ids": ids, "values": ArraySpec("float32", (k,))}, {"k": k, "order": order, "error": "none"}
        )
    arrays = {"ids": ids, "offsets": ArraySpec("float16", (k,)), "maximum": ArraySpec("float32")}
    error = "2**-11 of the offset in nats, 2**-25 at least"
    return Column(name, arrays, {"k": k, "order": order, "decode": "maximum + offsets", "error": error})


def encode_topk(top_logits_NK: Tensor, top_ids_NK: Tensor, *, column: Column) -> Arrays:
    """Encode the largest logits, float32 and in descending order, with their token ids."""
    ids = top_ids_NK.to(torch.uint16 if column.arrays["ids"].dtype == "uint16" else torch.uint32)
    if "values" in column.arrays:
        return {"ids": ids, "values": top_logits_NK}
    maximum_N = top_logits_NK[:, 0]
    return {"ids": ids, "offsets": _to_float16(top_logits_NK - maximum_N.unsqueeze(1)), "maximum": maximum_N}


def decode_topk(arrays: Mapping[str, Tensor], *, k: int) -> tuple[Tensor, Tensor]:
    """Give the k largest logits in float32 and their ids in int64, each [..., K], from a column of k or more."""
    ids = arrays["ids"][..., :k].long()
    if "values" in arrays:
        return arrays["values"][..., :k], ids
    return arrays["offsets"][..., :k].float() + arrays["maximum"].unsqueeze(-1), ids


def state_column(name: str, *, width: int) -> Column:
    """Describe the column of the post-norm last state in float16, from which the output head rebuilds all logits."""
    return Column(
        name, {"values": ArraySpec("float16", (width,))}, {"encoding": "float16", "error": "2**-11 of the value"}
    )


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Bring an encoded tensor to the host, bit for bit."""
    return tensor.contiguous().cpu().numpy()


def _encode_int8(state_ND: Tensor) -> Arrays:
    norm_N = state_ND.square().mean(dim=1).sqrt()
    ordinary_ND = state_ND[norm_N <= _SINK_RATIO * norm_N.median()]
    centre_D = ordinary_ND.mean(dim=0)
    spread_D = ordinary_ND.std(dim=0, correction=0).clamp(min=_SMALLEST_SPREAD)
    standardised_ND = (state_ND - centre_D) / spread_D
    # A floor keeps a position that equals the centre from dividing by zero.
    scale_N = (standardised_ND.abs().amax(dim=1) / _INT8_LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    values = (standardised_ND / scale_N.unsqueeze(1)).round().clamp(-_INT8_LEVELS, _INT8_LEVELS).to(torch.int8)
    return {"values": values, "scale": scale_N, "centre": centre_D, "spread": spread_D}


def _to_float16(tensor: Tensor) -> Tensor:
    half = tensor.to(torch.float16)
    if not torch.isfinite(half).all():
        raise OverflowError(f"{tensor.abs().max().item():.4g} is beyond float16's 65504")
    return half
