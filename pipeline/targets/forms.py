"""How the stored columns of a batch are read: to the teacher's distribution, and to its block outputs.

Shapes: B rows, T positions, N positions that count, K stored tokens, D width, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from coldstill.pipeline.losses.logits_targets import BucketedTopk, FullDistribution, LogitsTarget, SampledTail
from coldstill.pipeline.models.counted import at
from coldstill.pipeline.models.output_head import OutputHead
from coldstill.pipeline.targets.encodings import STORED, StateForm, decode_state
from coldstill.pipeline.targets.token_encodings import decode_tail, decode_topk
from coldstill.pipeline.targets.transform_coding import TransformCode

# What a batch calls the columns of the distribution.
TOPK, NORMALISER, TAIL, FINAL, LABEL = "topk", "logsumexp", "tail", "final", "label"

StoredLogits = Mapping[str, Mapping[str, Tensor]]
StoredStates = Mapping[str, Mapping[str, Tensor]]


class LogitsForm(Protocol):
    """How a recipe's kind of logits target is read.

    Attributes:
        roles: What a batch must carry.
    """

    roles: ClassVar[tuple[str, ...]]

    def read(self, stored: StoredLogits, places_N: Tensor, temperature: float) -> LogitsTarget:
        """Decode a batch's columns, [B, T, ...] by role and array, at some places of it.

        The normaliser among them, where the kind has one, is the one of this temperature.
        """


@dataclass(frozen=True)
class BucketedForm:
    """Kind `topk`: the K likeliest tokens, and one bucket for the rest, whose mass the normaliser gives exactly.

    Attributes:
        k: How many of the stored tokens to read.
        vocab_size: V.
    """

    roles: ClassVar[tuple[str, ...]] = (TOPK, NORMALISER)

    k: int
    vocab_size: int

    def read(self, stored: StoredLogits, places_N: Tensor, temperature: float) -> "BucketedTopk":
        """Decode a batch's columns."""
        top_logits, top_ids = decode_topk(_at(stored[TOPK], places_N), k=self.k)
        normaliser_N = at(stored[NORMALISER]["values"], places_N)
        return BucketedTopk(top_logits, top_ids, normaliser_N, temperature, self.vocab_size)


@dataclass(frozen=True)
class SampledForm:
    """Kind `topk_sampled`: the K likeliest tokens exactly, and M draws from the tail with importance weights.

    Attributes:
        k: How many of the likeliest tokens there are; the tail begins behind them.
    """

    roles: ClassVar[tuple[str, ...]] = (TOPK, TAIL, NORMALISER)

    k: int

    def read(self, stored: StoredLogits, places_N: Tensor, temperature: float) -> "SampledTail":
        """Decode a batch's columns."""
        head_logits, head_ids = decode_topk(_at(stored[TOPK], places_N), k=self.k)
        tail_logits, tail_ids, log_weights = decode_tail(_at(stored[TAIL], places_N))
        return SampledTail(
            logits_NE=torch.cat([head_logits, tail_logits], dim=-1),
            ids_NE=torch.cat([head_ids, tail_ids], dim=-1),
            weights_NE=torch.cat([torch.ones_like(head_logits), log_weights.exp()], dim=-1),
            log_normaliser_N=at(stored[NORMALISER]["values"], places_N),
            num_tokens=self.k,
            temperature=temperature,
        )


@dataclass(frozen=True)
class FinalForm:
    """Kind `final`: the post-norm last state and the output head, which give the distribution over every token.

    Attributes:
        form: How the states are stored.
        head: The teacher's output head.
        code: The states' transform code, where they are coded.
        correction_V: What is added to the logits at temperature 1 for the states' rounding, divided by T^2 at T.
    """

    roles: ClassVar[tuple[str, ...]] = (FINAL,)

    form: StateForm
    head: OutputHead
    code: TransformCode | None = None
    correction_V: Tensor | None = None
    _copies: dict[tuple[torch.device, torch.dtype], "FinalForm"] = field(
        default_factory=dict, repr=False, compare=False
    )

    def read(self, stored: StoredLogits, places_N: Tensor, temperature: float) -> "FullDistribution":
        """Decode a batch's columns."""
        own = self.on(places_N.device, _product_dtype(places_N.device, self.head.weight_VD.dtype))
        state_ND = at(decode_state(stored[FINAL], form=own.form, code=own.code), places_N)
        return FullDistribution(state_ND, own.head, temperature, own.correction_V)

    def on(self, device: torch.device, dtype: torch.dtype) -> "FinalForm":
        """Return the form with what it holds on a device, and the head in a dtype; it is brought there once."""
        if self.head.weight_VD.device == device and self.head.weight_VD.dtype == dtype:
            return self
        if (device, dtype) not in self._copies:
            code = None if self.code is None else self.code.to(device)
            correction_V = None if self.correction_V is None else self.correction_V.to(device)
            head = self.head.to(device).detached(dtype)
            self._copies[device, dtype] = replace(self, head=head, code=code, correction_V=correction_V, _copies={})
        return self._copies[device, dtype]


def _product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the teacher's product: that of the student's under autocast, its own elsewhere."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


@dataclass(frozen=True)
class HiddenForm:
    """How a batch's block outputs are stored.

    Attributes:
        form: The form of all of them.
        codes: The transform code of each teacher block, where they are coded.
    """

    form: StateForm
    codes: Mapping[int, TransformCode] = field(default_factory=dict)
    _copies: dict[tuple[int, torch.device], TransformCode] = field(default_factory=dict, repr=False, compare=False)

    @property
    def stored_share(self) -> float:
        """The share of positions that are stored."""
        return self.form.fraction

    def decode(self, stored: StoredStates, block: int) -> Tensor:
        """Return a teacher block's output, [B, T, Dt] in float32, on the device of what is stored."""
        arrays = stored[str(block)]
        return decode_state(arrays, form=self.form, code=self._code(block, next(iter(arrays.values())).device))

    def chosen(self, stored: StoredStates, block: int, counts_BT: Tensor) -> Tensor:
        """Say which of the positions that count are stored, [B, T]."""
        arrays = stored[str(block)]
        return counts_BT & arrays[STORED].bool() if STORED in arrays else counts_BT

    def _code(self, block: int, device: torch.device) -> TransformCode | None:
        """Return a block's transform code on a device, which it is brought to once."""
        code = self.codes.get(block)
        if code is None or code.centre_D.device == device:
            return code
        if (block, device) not in self._copies:
            self._copies[block, device] = code.to(device)
        return self._copies[block, device]


def _at(arrays: Mapping[str, Tensor], places_N: Tensor) -> dict[str, Tensor]:
    return {name: at(values, places_N) for name, values in arrays.items()}
