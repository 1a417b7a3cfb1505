"""Targets of hidden states: the outputs of decoder blocks, and the post-norm last state.

Shapes: N positions of some rows, P of these that are stored, D width.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from coldstill.cache.columns import Column
from coldstill.pipeline.losses.logits_targets import FullDistribution
from coldstill.pipeline.models.forward import InputOf, Place
from coldstill.pipeline.models.output_head import OutputHead
from coldstill.pipeline.models.sizes import ModelSizes
from coldstill.pipeline.targets.calibrations import CALIBRATION, code_digest
from coldstill.pipeline.targets.captured import Captured, CaptureRequest
from coldstill.pipeline.targets.encodings import (
    CODED,
    ENCODING_BYTES,
    STORED,
    StateForm,
    decode_state,
    encode_state,
    ordinary_positions,
    state_column,
    stated_error,
    written_share,
)
from coldstill.pipeline.targets.fisher_information import OnWords, fisher_information
from coldstill.pipeline.targets.live_errors import (
    KL,
    SHARE,
    Arrays,
    Comparison,
    Difference,
    Live,
    divergences,
    variance_share,
)
from coldstill.pipeline.targets.target import Encoding, TeacherTarget
from coldstill.pipeline.targets.transform_coding import TransformCode, fit_code, logit_correction

_FINAL, _HIDDEN = "logits/final/", "hidden/"
# Each position speaks of the whole vocabulary: by so many, coded states have a KL within 2% of that by all of ten times
# as many, in no more bytes.
_FISHER_POSITIONS = 768
# What chance decides of a state is whether a position is stored, alike for every block.
_PURPOSE = "hidden"


@dataclass(frozen=True)
class _States(TeacherTarget):
    """States in one form.

    Attributes:
        form: How they are stored.
    """

    form: StateForm

    _half_step: ClassVar[float]

    @property
    @abstractmethod
    def _place(self) -> str:
        """The column's name without its form."""

    @property
    def name(self) -> str:
        """The column's name."""
        return f"{self._place}/{self.form}"

    @property
    def calibration(self) -> str | None:
        """That of these states, whatever the step; None for a form that is not coded."""
        return f"calibration/{self._place}" if self.form.encoding == CODED else None

    @property
    def stored_share(self) -> float:
        """The share of positions that the form stores."""
        return self.form.fraction

    def describe(self, sizes: ModelSizes, code: TransformCode | None = None) -> Column:
        """Describe the column that `encode` fills; a coded one names the digest of its calibration."""
        column = state_column(self.name, form=self.form, width=sizes.width, code=code)
        if code is None:
            return column
        return Column(self.name, column.arrays, {**column.attributes, CALIBRATION: code_digest(code)})

    def raw_bytes(self, sizes: ModelSizes, *, num_tokens: int, num_shards: int) -> int:
        """Return the bytes before compression; a byte of a coded state holds one coefficient or more."""
        if self.form.encoding == CODED:
            return round(sizes.width * num_tokens * self.form.fraction)
        return super().raw_bytes(sizes, num_tokens=num_tokens, num_shards=num_shards)

    @property
    def written_share(self) -> float:
        """That of the form."""
        return written_share(self.form, half_step=self._half_step)

    def encoding_bytes(self, sizes: ModelSizes) -> int:
        """Return the bytes of the copies, most of them in float32 or int64, that the form is made by."""
        return ENCODING_BYTES[self.form.encoding] * sizes.width

    def encode(self, captured: Captured, by: Encoding) -> dict[str, Tensor]:
        """Encode the states of a whole shard."""
        stored_N = None
        if self.form.fraction < 1.0:
            stored_N = by.uniforms.draw(_PURPOSE).to(by.device) < self.form.fraction
        states_ND = self.live_values(captured).to(by.device)
        return encode_state(states_ND, form=self.form, code=by.code, stored_N=stored_N)

    def decode(self, arrays: Arrays, code: TransformCode | None = None) -> Tensor:
        """Return the states in float32, from arrays of a row or a batch of rows."""
        return decode_state(arrays, form=self.form, code=code)

    def calibration_states(self, captured: Captured) -> Tensor:
        """Return the states themselves, [N, D]."""
        return self.live_values(captured)

    def compare(self, stored: Sequence[Arrays], live: Live, by: Comparison) -> Difference:
        """Compare decoded states: each channel with what the form states, or each coefficient with half a step."""
        code = by.codes.get(self.name)
        decoded_ND = torch.cat([self.decode(arrays, code) for arrays in stored])
        kept_N = torch.ones(len(decoded_ND), dtype=torch.bool, device=decoded_ND.device)
        if self.form.fraction < 1.0:
            kept_N = torch.cat([arrays[STORED] for arrays in stored]).bool()
        decoded_PD, alone_PD, together_PD = (values[kept_N].float() for values in (decoded_ND, *live))
        apart_PD, noise_PD = decoded_PD - alone_PD, together_PD - alone_PD
        if code is None:
            stated_PD = stated_error(self.form, stored, live[0].float())[kept_N]
            scale_PD = alone_PD.abs().amax(dim=-1, keepdim=True)
        else:
            apart_PD, noise_PD = apart_PD @ code.analysis_DD, noise_PD @ code.analysis_DD
            assert self.form.step is not None
            stated_PD = torch.full_like(apart_PD, 0.5 * self.form.step)
            scale_PD = (alone_PD.square() + code.centre_D.square()) @ code.analysis_DD.square()
            scale_PD = scale_PD.sqrt()
        # Each position by its own noise: an attention sink has hundreds of times that of the others.
        noise_P1 = noise_PD.abs().amax(dim=-1, keepdim=True)
        noise_P1 = torch.maximum(noise_P1, noise_P1.median()) if len(noise_P1) else noise_P1
        excess_P = by.excess(apart_PD, noise_P1, stated_PD, scale_PD).amax(dim=-1)
        error_P, noise_P = self._errors(decoded_PD, (live[0][kept_N], live[1][kept_N]), by)
        return Difference(error_P, noise_P, excess_P, kept_N)

    @abstractmethod
    def _errors(self, decoded_PD: Tensor, live_PD: Live, by: Comparison) -> tuple[Tensor, Tensor]:
        """Return error and noise in the column's measure, [P] each."""


@dataclass(frozen=True)
class FinalState(_States):
    """The post-norm last state: with the output head, the distribution over every token at every temperature."""

    measure = KL
    _half_step = 0.018

    @property
    def _place(self) -> str:
        return _FINAL.removesuffix("/")

    @classmethod
    def parse(cls, name: str) -> "FinalState | None":
        """Read the column's name."""
        return cls(StateForm.parse(name.removeprefix(_FINAL))) if name.startswith(_FINAL) else None

    @property
    def needs(self) -> CaptureRequest:
        """The last state."""
        return CaptureRequest(final_state=True)

    @property
    def needs_stored_head(self) -> bool:
        """Logits are rebuilt by the store's own head."""
        return True

    def live_values(self, captured: Captured) -> Tensor:
        """Return the last states, [N, D]."""
        assert captured.final_state_ND is not None, "the request asked for it"
        return captured.final_state_ND

    def calibration_words(self, head: OutputHead) -> int:
        """Return all words of the vocabulary twice."""
        return 2 * head.vocab_size

    def fit_code(self, states_ND: Tensor, head: OutputHead, *, on_words: OnWords = lambda _: None) -> TransformCode:
        """Fit its code: what matters is the KL of the distributions that the output head makes."""
        spread = torch.linspace(0, len(states_ND) - 1, min(len(states_ND), _FISHER_POSITIONS)).round().long()
        metric_DD = fisher_information(states_ND[spread.to(states_ND.device)], head, on_words=on_words)
        return fit_code(states_ND.float().cpu(), metric_DD.cpu())

    @property
    def calibration_metric(self) -> str:
        """For a person."""
        return "the output head's mean Fisher information"

    def correction(self, head: OutputHead, code: TransformCode | None) -> Tensor | None:
        """Return what is added to the rebuilt logits at temperature 1 for the states' rounding, [V]."""
        if code is None or self.form.step is None:
            return None
        return logit_correction(head, code, self.form.step)

    def _errors(self, decoded_PD: Tensor, live_PD: Live, by: Comparison) -> tuple[Tensor, Tensor]:
        rebuilt = FullDistribution(decoded_PD, by.stored_head, 1.0, by.corrections.get(self.name))
        return divergences(by.head, *live_PD, rebuilt)


@dataclass(frozen=True)
class _BlockStates(_States):
    """The residual stream beside a decoder block.

    Attributes:
        block: The block's 0-based number.
    """

    block: int

    measure = SHARE
    _half_step = 0.19
    _prefix: ClassVar[str]

    @property
    def _place(self) -> str:
        return f"{self._prefix}{self.block}"

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """Read the column's name."""
        if not name.startswith(cls._prefix):
            return None
        block, form = name.removeprefix(cls._prefix).split("/")
        return cls(StateForm.parse(form), int(block))

    @property
    @abstractmethod
    def _where(self) -> Place:
        """The place in the teacher."""

    @property
    def needs(self) -> CaptureRequest:
        """The stream at its place."""
        return CaptureRequest(blocks=(self._where,))

    def live_values(self, captured: Captured) -> Tensor:
        """Return the states, [N, D]."""
        return captured.hidden_ND[self._where]

    def fit_code(
        self,
        states_ND: Tensor,
        head: OutputHead,  # noqa: ARG002
        *,
        on_words: OnWords = lambda _: None,  # noqa: ARG002
    ) -> TransformCode:
        """Fit its code in units of the states' spread: attention sinks set none of it."""
        ordinary_ND = states_ND[ordinary_positions(states_ND.float())].float().cpu()
        variance = float(ordinary_ND.var(dim=0, correction=0).mean())
        metric_DD = torch.eye(ordinary_ND.shape[1]) / max(variance, torch.finfo(torch.float32).tiny)
        return fit_code(ordinary_ND, metric_DD)

    @property
    def calibration_metric(self) -> str:
        """For a person."""
        return "the mean squared error"

    def _errors(self, decoded_PD: Tensor, live_PD: Live, by: Comparison) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        alone_PD, together_PD = (values.float() for values in live_PD)
        return variance_share(decoded_PD, alone_PD), variance_share(together_PD, alone_PD)


@dataclass(frozen=True)
class BlockOutput(_BlockStates):
    """The output of a decoder block."""

    _prefix = _HIDDEN

    def name_of_several(self, count: int) -> str:
        """Name the columns of so many blocks together, of which nobody knows yet which they are."""
        return f"{_HIDDEN}({count} blocks)/{self.form}"

    @property
    def _where(self) -> Place:
        return self.block


@dataclass(frozen=True)
class BlockInput(_BlockStates):
    """The input of a decoder block: of most, the output of the one before; of the first, the embeddings."""

    _prefix = "hidden_input/"

    @property
    def _where(self) -> Place:
        return InputOf(self.block)
