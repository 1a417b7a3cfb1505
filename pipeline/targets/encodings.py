"""States to stored arrays and back: the numeric forms of block outputs and of the final state, lossy or not.

Everything runs on the tensor's own device. Each form states its error in the column's attributes; a test holds the
error to it.
Shapes: N positions of all rows, T positions of a row, D width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coldstill.cache.columns import ArraySpec, Column
from coldstill.pipeline.targets.transform_coding import (
    TransformCode,
    code_arrays,
    decode_coefficients,
    encode_coefficients,
)

Arrays = dict[str, Tensor]

CODED = "coded"
STORED = "stored"

_INT8_LEVELS = 127
_INT8_BASE = 2 * _INT8_LEVELS + 1
# Where one position's largest channel is beyond so many times its next ones, the largest overflow and set no scale.
_OUTLIER_RATIO = 2.0
_OUTLIER_SHARE = 64
# A position whose norm is this many times the median's is an attention sink: it is stored, but sets no statistics.
_SINK_RATIO = 10.0
_SMALLEST_SPREAD = 1e-6
# Of the value, and below the smallest normal number.
_FLOAT_BOUNDS = {"float16": (2**-11, 2**-25), "bfloat16": (2**-8, 2**-134), "float32": (0.0, 0.0)}
_FLOAT_ERRORS = {"float16": "2**-11 of the value", "bfloat16": "2**-8 of the value", "float32": "none"}
_SAMPLED = "_sampled_"
# Bytes that `encode_state` takes for each number while it encodes.
ENCODING_BYTES = {"coded": 40, "int8": 17, "float16": 7, "bfloat16": 2, "float32": 4}
# Of a form's bytes, what compression leaves of real models' states; and of coded ones, how much less at twice the step.
_WRITTEN_SHARES = {"int8": 0.92, "float16": 0.93, "bfloat16": 0.79, "float32": 0.93}
_LESS_AT_TWICE_THE_STEP, _LEAST_SHARE = 0.13, 0.05


@dataclass(frozen=True)
class StateForm:
    """How states are stored; its text is the last part of a column's name.

    Attributes:
        encoding: `int8`, `float16`, `bfloat16`, `float32` or `coded`.
        step: Of `coded`: what coefficients are rounded to multiples of.
        fraction: The share of positions that are stored, each chosen at random.
    """

    encoding: str
    step: float | None = None
    fraction: float = 1.0

    def __str__(self) -> str:
        step = "" if self.step is None else f"_{self.step:g}"
        sampled = "" if self.fraction == 1.0 else f"{_SAMPLED}{self.fraction:g}"
        return f"{self.encoding}{step}{sampled}"

    @classmethod
    def parse(cls, text: str) -> "StateForm":
        """Read the text of a form."""
        form, _, fraction = text.partition(_SAMPLED)
        encoding, _, step = form.partition("_")
        return cls(encoding, float(step) if step else None, float(fraction) if fraction else 1.0)


def state_column(name: str, *, form: StateForm, width: int, code: TransformCode | None = None) -> Column:
    """Describe the column that `encode_state` fills.

    Args:
        name: The column's name.
        form: How its states are stored.
        width: D.
        code: The transform code, for encoding `coded`.
    """
    arrays, attributes = _arrays_of(form, width, code)
    if form.fraction < 1.0:
        arrays[STORED] = ArraySpec("uint8")
        attributes["positions"] = f"each is stored with probability {form.fraction:g}; where stored is 0, zeros"
    return Column(name, arrays, {"encoding": form.encoding, **attributes})


def encode_state(
    state_ND: Tensor, *, form: StateForm, code: TransformCode | None = None, stored_N: Tensor | None = None
) -> Arrays:
    """Encode the states of a whole shard, [N, D] in any floating dtype.

    int8: every channel is centred and divided by its spread over the shard, then each position is scaled so that its
    largest channel is 127. Both matter: channels differ in scale by orders of magnitude, and so do positions. A few
    outlier channels that would take the range from all others overflow into an array of their own instead.

    Args:
        state_ND: The states.
        form: How to store them.
        code: The transform code, for encoding `coded`.
        stored_N: Which positions to store, for a form with a fraction below 1.

    Raises:
        OverflowError: A value is beyond float16's range; bfloat16, int8 and coded hold it.
    """
    arrays = _encode(state_ND, form, code)
    if form.fraction < 1.0:
        assert stored_N is not None
        arrays = {
            name: values * stored_N.view(-1, *[1] * (values.dim() - 1)).to(values.dtype)
            if len(values) == len(stored_N) and name not in ("centre", "spread")
            else values
            for name, values in arrays.items()
        }
        arrays[STORED] = stored_N.to(torch.uint8)
    return arrays


def decode_state(arrays: Mapping[str, Tensor], *, form: StateForm, code: TransformCode | None = None) -> Tensor:
    """Return states in float32, [..., T, D], from arrays of `[..., T, D]`, `[..., T]` and `[..., D]`."""
    if form.encoding == CODED:
        assert code is not None
        assert form.step is not None
        return decode_coefficients(arrays, code, form.step)
    values = arrays["values"]
    if form.encoding == "int8":
        states = values.float().add_(arrays["overflow"], alpha=_INT8_BASE).mul_(arrays["scale"].unsqueeze(-1))
        return states.mul_(arrays["spread"].unsqueeze(-2)).add_(arrays["centre"].unsqueeze(-2))
    if values.dtype == torch.uint16:
        return values.view(torch.bfloat16).float()
    return values.float()


def stated_error(form: StateForm, stored: Sequence[Mapping[str, Tensor]], states_ND: Tensor) -> Tensor:
    """Return the error that a form which is not coded states of each element, [N, D], in float32.

    Args:
        form: The form.
        stored: The arrays of each row.
        states_ND: The exact states of all rows.
    """
    if form.encoding == "int8":
        return torch.cat([0.5 * arrays["scale"].unsqueeze(1) * arrays["spread"] for arrays in stored])
    relative, absolute = _FLOAT_BOUNDS[form.encoding]
    return relative * states_ND.abs() + absolute


def ordinary_positions(state_ND: Tensor) -> Tensor:
    """Return the positions [N] that are no attention sinks: those whose norm is not many times the median's."""
    norm_N = state_ND.square().mean(dim=1).sqrt()
    return norm_N <= _SINK_RATIO * norm_N.median()


def written_share(form: StateForm, *, half_step: float) -> float:
    """Return the share of a form's bytes that compression leaves, as it was measured on real models: docs/plan.md.

    Args:
        form: The form.
        half_step: At this step compression leaves half of a coded state's bytes, which are one for each number.
    """
    if form.step is None:
        return _WRITTEN_SHARES[form.encoding]
    return max(_LEAST_SHARE, 0.5 - _LESS_AT_TWICE_THE_STEP * math.log2(form.step / half_step))


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Bring an encoded tensor to the host, bit for bit."""
    return tensor.contiguous().cpu().numpy()


def float_bits(values: Tensor, dtype: str) -> Tensor:
    """Return a floating tensor as the store holds that dtype: bfloat16 as the uint16 of its bits.

    Raises:
        OverflowError: A value is beyond float16's range.
    """
    if dtype == "bfloat16":
        return values.to(torch.bfloat16).view(torch.uint16)
    return _to_float16(values) if dtype == "float16" else values.float()


def from_float_bits(values: Tensor) -> Tensor:
    """Return what `float_bits` stored, in float32."""
    return (values.view(torch.bfloat16) if values.dtype == torch.uint16 else values).float()


def _arrays_of(form: StateForm, width: int, code: TransformCode | None) -> tuple[dict[str, ArraySpec], dict[str, Any]]:
    if form.encoding == CODED:
        assert code is not None
        assert form.step is not None
        layout = [[part.array, part.begin, part.end, part.base, part.per_byte] for part in code.layout(form.step)]
        return code_arrays(code, form.step), {
            "step": form.step,
            "layout": layout,
            "decode": "layout gives array, first and last coefficient, base and digits a byte (the first one lowest, "
            "each less base // 2); state = step * (digits + base * overflow) @ synthesis + centre",
            "error": "at most half a step in each coefficient, and float32 rounding",
        }
    if form.encoding == "int8":
        arrays = {
            "values": ArraySpec("int8", (width,)),
            "overflow": ArraySpec("int16", (width,)),
            "scale": ArraySpec("float32"),
            "centre": ArraySpec("float32", (width,), axis="shard"),
            "spread": ArraySpec("float32", (width,), axis="shard"),
        }
        return arrays, {
            "decode": "centre + spread * scale * (values + 255 * overflow)",
            "error": "at most 0.5 * scale * spread, and float32 rounding",
        }
    stored = "uint16" if form.encoding == "bfloat16" else form.encoding
    attributes = {"error": _FLOAT_ERRORS[form.encoding]}
    if form.encoding == "bfloat16":
        attributes["decode"] = "the 16 bits are the upper half of a float32"
    return {"values": ArraySpec(stored, (width,))}, attributes


def _encode(state_ND: Tensor, form: StateForm, code: TransformCode | None) -> Arrays:
    if form.encoding == CODED:
        assert code is not None
        assert form.step is not None
        return encode_coefficients(state_ND, code, form.step)
    if form.encoding == "int8":
        return _encode_int8(state_ND.float())
    return {"values": float_bits(state_ND, form.encoding)}


def _encode_int8(state_ND: Tensor) -> Arrays:
    ordinary_ND = state_ND[ordinary_positions(state_ND)]
    centre_D = ordinary_ND.mean(dim=0)
    spread_D = (ordinary_ND - centre_D).square_().mean(dim=0).sqrt().clamp(min=_SMALLEST_SPREAD)
    standardised_ND = (state_ND - centre_D).div_(spread_D)
    largest_N = standardised_ND.abs().amax(dim=1)
    reach_N = _reach(standardised_ND, largest_N)
    scale_N = (reach_N / _INT8_LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    levels_ND = standardised_ND.div_(scale_N.unsqueeze(1)).round_()
    overflow_ND = torch.zeros_like(levels_ND, dtype=torch.int16)
    # Levels overflow in few positions: those whose largest channel did not set the scale.
    outlying_M = (reach_N < largest_N).nonzero().squeeze(1)
    outlying_MD = levels_ND[outlying_M]
    overflow_MD = (outlying_MD / _INT8_BASE).round_()
    levels_ND[outlying_M] = outlying_MD - _INT8_BASE * overflow_MD
    overflow_ND[outlying_M] = overflow_MD.to(torch.int16)
    return {
        "values": levels_ND.to(torch.int8),
        "overflow": overflow_ND,
        "scale": scale_N,
        "centre": centre_D,
        "spread": spread_D,
    }


def _reach(standardised_ND: Tensor, largest_N: Tensor) -> Tensor:
    """Return what becomes the highest level of each position: its largest channel, or less where that is an outlier.

    An outlier is beyond so many times the next channels. Where as many channels as may be outliers, and one more, come
    near enough to the largest one, it is none: counting them is cheaper than finding the next ones.
    """
    num_outliers = math.ceil(standardised_ND.shape[1] / _OUTLIER_SHARE)
    num_near_N = (standardised_ND.abs() >= largest_N.unsqueeze(1) / _OUTLIER_RATIO).sum(dim=1)
    outlying_M = (num_near_N <= num_outliers).nonzero().squeeze(1)
    rank = min(num_outliers + 1, standardised_ND.shape[1])
    next_M = standardised_ND[outlying_M].abs().topk(rank, dim=1).values[:, -1]
    reach_M = torch.minimum(largest_N[outlying_M], _OUTLIER_RATIO * next_M)
    # Where all but the outliers equal the centre, the largest sets the scale after all; the floor divides by no zero.
    reach_M = reach_M.where(reach_M * _INT8_BASE * 32767 > largest_N[outlying_M], largest_N[outlying_M])
    return largest_N.index_copy(0, outlying_M, reach_M)


def _to_float16(tensor: Tensor) -> Tensor:
    half = tensor.to(torch.float16)
    if not torch.isfinite(half).all():
        raise OverflowError(f"{tensor.abs().max().item():.4g} is beyond float16's 65504")
    return half
