"""Targets of one number a token: the logit of the token that follows, and the logarithm of the normaliser.

Shapes: N positions of some rows.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coldstill.cache.columns import ArraySpec, Column
from coldstill.pipeline.models.sizes import ModelSizes
from coldstill.pipeline.targets.captured import Captured, CaptureRequest
from coldstill.pipeline.targets.live_errors import NATS, Arrays, Comparison, Difference, Live
from coldstill.pipeline.targets.target import Encoding, TeacherTarget, whole
from coldstill.pipeline.targets.transform_coding import TransformCode

_LOGSUMEXP = "logsumexp/"


class _TokenLogit(TeacherTarget):
    """One float32 a token, stored exactly."""

    measure = NATS

    def describe(self, sizes: ModelSizes, code: TransformCode | None = None) -> Column:  # noqa: ARG002
        """Describe the column: one array of the token axis."""
        return Column(self.name, {"values": ArraySpec("float32")})

    @property
    def written_share(self) -> float:
        """As measured: docs/plan.md."""
        return 0.86

    def encode(self, captured: Captured, by: Encoding) -> dict[str, Tensor]:  # noqa: ARG002
        """Store the number as it is."""
        return {"values": self.live_values(captured)}

    def compare(self, stored: Sequence[Arrays], live: Live, by: Comparison) -> Difference:
        """Compare at every position that has the number."""
        values_N = whole(stored)["values"]
        kept_N = self._has_value([len(row["values"]) for row in stored], values_N.device)
        stored_P, alone_P, together_P = (values[kept_N] for values in (values_N, *live))
        return by.of_logits(stored_P - alone_P, together_P - alone_P, alone_P, kept_N=kept_N, stated=0.0)

    @abstractmethod
    def _has_value(self, lengths: Sequence[int], device: torch.device) -> Tensor:
        """Return which positions of rows of these lengths have the number, [N]."""


@dataclass(frozen=True)
class LabelLogit(_TokenLogit):
    """The logit of the token that follows, undivided; 0 at a row's last position, which has none."""

    @property
    def name(self) -> str:
        """The column's name."""
        return "label_logit"

    @classmethod
    def parse(cls, name: str) -> "LabelLogit | None":
        """Read the column's name."""
        return cls() if name == cls().name else None

    @property
    def needs(self) -> CaptureRequest:
        """The label's logit."""
        return CaptureRequest(labels=True)

    def live_values(self, captured: Captured) -> Tensor:
        """Return the logits, [N]."""
        assert captured.label_logit_N is not None, "the request asked for it"
        return captured.label_logit_N

    def _has_value(self, lengths: Sequence[int], device: torch.device) -> Tensor:
        has_label_N = torch.ones(sum(lengths), dtype=torch.bool, device=device)
        has_label_N[torch.tensor(lengths, device=device).cumsum(0) - 1] = False  # no token follows
        return has_label_N


@dataclass(frozen=True)
class Normaliser(_TokenLogit):
    """The teacher's logsumexp over the vocabulary of logits / temperature.

    Attributes:
        temperature: What logits are divided by.
    """

    temperature: float

    @property
    def name(self) -> str:
        """The column's name."""
        return f"{_LOGSUMEXP}{self.temperature:g}"

    @classmethod
    def parse(cls, name: str) -> "Normaliser | None":
        """Read the column's name."""
        return cls(float(name.removeprefix(_LOGSUMEXP))) if name.startswith(_LOGSUMEXP) else None

    @property
    def needs(self) -> CaptureRequest:
        """The logsumexp at its temperature."""
        return CaptureRequest(temperatures=(self.temperature,))

    def live_values(self, captured: Captured) -> Tensor:
        """Return the logsumexps, [N]."""
        return captured.logsumexp_N[self.temperature]

    def _has_value(self, lengths: Sequence[int], device: torch.device) -> Tensor:
        return torch.ones(sum(lengths), dtype=torch.bool, device=device)
