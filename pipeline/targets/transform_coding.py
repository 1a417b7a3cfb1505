"""Transform coding of states: rotate to a basis in which one uniform step is right for every coefficient, and round.

A code is fitted once to calibration states and kept with the store; the step is a column's own. Coefficients are sorted
by spread, and those whose spread is a similar number of steps share an array: the narrow ones several to a byte, in a
base that holds nearly all of their values, so that the store's entropy coder meets bytes of one distribution each. What
lies beyond the base goes into an overflow array that is zero nearly everywhere: nothing is clipped.

The metric of a code says which errors matter. For block outputs it is the identity (a Karhunen-Loève basis). For the
final state it is the output head's mean Fisher information: the KL between the distributions of a state and of its
rebuilt form is, to second order, the error's square under it.
Shapes: N positions, D width, V vocabulary.
"""

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from coldstill.cache.columns import ArraySpec
from coldstill.pipeline.models.output_head import OutputHead

# From so many steps of spread on, a coefficient is coded in this base, so many digits to a byte. A digit reaches half
# the base: some four spreads and more, so that overflows are rare, and a byte's entropy stays above a bit.
_CLASSES = ((8.0, 255, 1), (4.0, 255, 1), (1.5, 255, 1), (0.5, 15, 2), (0.3, 5, 3), (0.0, 3, 5))
_OVERFLOW = "overflow"
_LARGEST_OVERFLOW = 32767
# Directions that hardly reach the logits are kept apart from zero by this share of the strongest.
_SMALLEST_EIGENVALUE = 1e-9
# Beyond so many steps of spread, rounding adds a twelfth of a squared step to the variance, to float32's precision.
_FINE_SPREAD = 4.0


@dataclass(frozen=True)
class TransformCode:
    """A basis for states: coefficients are `(state - centre) @ analysis`, states `coefficients @ synthesis + centre`.

    Attributes:
        centre_D: Mean of the calibration states.
        analysis_DD: States to coefficients.
        synthesis_DD: Coefficients to states, the inverse.
        spread_D: Standard deviation of each coefficient over the calibration states, descending.
    """

    centre_D: Tensor
    analysis_DD: Tensor
    synthesis_DD: Tensor
    spread_D: Tensor
    # By step: what follows from the spreads, which a GPU would be asked for in each batch.
    _layouts: dict[float, list["DigitClass"]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _bases: dict[float, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def to(self, device: torch.device) -> "TransformCode":
        """Return the code on a device."""
        own = (self.centre_D, self.analysis_DD, self.synthesis_DD, self.spread_D)
        return TransformCode(*(values.to(device) for values in own))

    def layout(self, step: float) -> list["DigitClass"]:
        """Say how coefficients are laid into bytes at a step, a function of the spreads alone."""
        if step not in self._layouts:
            self._layouts[step] = _layout(self.spread_D.double() / step)
        return self._layouts[step]

    def bases(self, step: float) -> Tensor:
        """Return the base of each coefficient's digit at a step, float32 [D]."""
        if step not in self._bases:
            counts = [(float(part.base), part.end - part.begin) for part in self.layout(step)]
            values = list(itertools.chain.from_iterable([base] * count for base, count in counts))
            self._bases[step] = torch.tensor(values, device=self.spread_D.device)
        return self._bases[step]


@dataclass(frozen=True)
class DigitClass:
    """Coefficients `begin` to `end` as digits of one base, several to a byte, the first one lowest.

    Attributes:
        array: The array that holds the bytes, [N, num_bytes] in uint8.
        begin: The first coefficient.
        end: One behind the last.
        base: Odd; a digit d stands for d - base // 2.
        per_byte: Digits in a byte.
    """

    array: str
    begin: int
    end: int
    base: int
    per_byte: int

    @property
    def num_bytes(self) -> int:
        """Bytes of a position."""
        return -(-(self.end - self.begin) // self.per_byte)

    def pack(self, digits_ND: Tensor) -> Tensor:
        """Lay digits from -(base // 2) to base // 2 into bytes."""
        shifted = digits_ND + self.base // 2
        padding = self.num_bytes * self.per_byte - shifted.shape[-1]
        shifted = torch.nn.functional.pad(shifted, (0, padding)).unflatten(-1, (self.num_bytes, self.per_byte))
        powers = torch.tensor([self.base**place for place in range(self.per_byte)], device=shifted.device)
        return (shifted * powers).sum(dim=-1).to(torch.uint8)

    def unpack(self, bytes_ND: Tensor) -> Tensor:
        """Return digits back, in float32."""
        table = _table(self.base, self.per_byte, bytes_ND.device)
        return table[bytes_ND.int()].flatten(-2)[..., : self.end - self.begin]


@functools.lru_cache(maxsize=64)
def _table(base: int, per_byte: int, device: torch.device) -> Tensor:
    """Return the digits of each byte, float32 [256, per_byte]."""
    values = torch.arange(256, device=device)
    places = [(values // base**place) % base - base // 2 for place in range(per_byte)]
    return torch.stack(places, dim=-1).float()


@torch.no_grad()
def fit_code(states_ND: Tensor, metric_DD: Tensor | None = None) -> TransformCode:
    """Fit a code to calibration states under a metric, the identity where it is None.

    With the metric M, coefficients are those of M^(1/2) (state - centre) in the eigenbasis of its covariance: the same
    error in any of them costs the same.
    """
    centred = states_ND.double() - states_ND.double().mean(dim=0)
    covariance = centred.T @ centred / len(centred)
    width = states_ND.shape[1]
    root = inverse_root = torch.eye(width, dtype=torch.float64, device=states_ND.device)
    if metric_DD is not None:
        eigenvalues, vectors = torch.linalg.eigh(metric_DD.double())
        eigenvalues = eigenvalues.clamp(min=float(eigenvalues.max()) * _SMALLEST_EIGENVALUE)
        root = (vectors * eigenvalues.sqrt()) @ vectors.T
        inverse_root = (vectors / eigenvalues.sqrt()) @ vectors.T
    variances, rotation = torch.linalg.eigh(root @ covariance @ root)
    variances, rotation = variances.flip(0), rotation.flip(1)
    return TransformCode(
        centre_D=states_ND.double().mean(dim=0).float(),
        analysis_DD=(root @ rotation).float(),
        synthesis_DD=(rotation.T @ inverse_root).float(),
        spread_D=variances.clamp(min=0.0).sqrt().float(),
    )


def code_arrays(code: TransformCode, step: float) -> dict[str, ArraySpec]:
    """Describe the arrays that `encode_coefficients` fills."""
    arrays = {part.array: ArraySpec("uint8", (part.num_bytes,)) for part in code.layout(step)}
    return {**arrays, _OVERFLOW: ArraySpec("int16", (len(code.spread_D),))}


def encode_coefficients(states_ND: Tensor, code: TransformCode, step: float) -> dict[str, Tensor]:
    """Round states' coefficients to multiples of the step.

    Raises:
        OverflowError: A coefficient is beyond 32767 times its base.
    """
    levels_ND = ((states_ND.float() - code.centre_D) @ code.analysis_DD / step).round()
    base_D = code.bases(step)
    overflow_ND = (levels_ND / base_D).round()
    if float(overflow_ND.abs().amax()) > _LARGEST_OVERFLOW:
        raise OverflowError(f"a coefficient of {levels_ND.abs().amax() * step:.4g} is too many steps of {step:g}")
    digits_ND = (levels_ND - base_D * overflow_ND).long()
    arrays = {part.array: part.pack(digits_ND[:, part.begin : part.end]) for part in code.layout(step)}
    return {**arrays, _OVERFLOW: overflow_ND.to(torch.int16)}


def decode_coefficients(arrays: Mapping[str, Tensor], code: TransformCode, step: float) -> Tensor:
    """Return the states back in float32, [..., D]."""
    digits = torch.cat([part.unpack(arrays[part.array]) for part in code.layout(step)], dim=-1)
    levels = digits + code.bases(step) * arrays[_OVERFLOW]
    return (levels * step) @ code.synthesis_DD + code.centre_D


@torch.no_grad()
def logit_correction(head: OutputHead, code: TransformCode, step: float) -> Tensor:
    """Return what is added to each logit at temperature 1, [V], so that rounding does not shift the mean distribution.

    A rebuilt logit z + e has E[exp(z + e)] = exp(z + var(e) / 2) where e is independent noise, as it is for fine steps,
    and too little where coefficients are rounded to zero. The correction is minus half the variance that rounding adds
    to each logit, for coefficients that are normally distributed; at temperature T it is divided by T^2. Behind a
    soft-cap the error is no longer additive, and the correction is zero.
    """
    if head.softcap is not None:
        return torch.zeros(head.vocab_size, device=head.weight_VD.device)
    excess_D = torch.tensor(
        [_rounding_excess(spread / step) for spread in code.spread_D.double().tolist()], device=head.weight_VD.device
    )
    reach_VD = head.scale * head.weight_VD.float() @ code.synthesis_DD.T
    return -0.5 * step**2 * (reach_VD.square() @ excess_D.float())


def _layout(steps_D: Tensor) -> list[DigitClass]:
    """Lay coefficients with spreads of so many steps, in descending order, into classes."""
    classes, begin = [], 0
    values_D = steps_D.cpu()
    for index, (lowest, base, per_byte) in enumerate(_CLASSES):
        end = max(begin, int((values_D > lowest).sum())) if lowest else len(values_D)
        if end > begin:
            classes.append(DigitClass(f"digits_{index}", begin, end, base, per_byte))
        begin = end
    return classes


def _rounding_excess(spread: float) -> float:
    """Return the variance that rounding to integers adds to a normal variable of mean 0 and this standard deviation."""
    if spread > _FINE_SPREAD:
        return 1 / 12
    if spread == 0.0:
        return 0.0

    def beyond(level: float) -> float:
        return 0.5 * math.erfc(level / (spread * math.sqrt(2)))

    reach = math.ceil(10 * spread) + 1
    levels = (2 * level**2 * (beyond(level - 0.5) - beyond(level + 0.5)) for level in range(1, reach))
    return sum(levels) - spread**2
