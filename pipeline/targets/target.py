"""The protocol of targets: what each kind of column has to know, so that nothing else has to know the kinds.

Both stages, the dry run, a plan, `cache verify` and the live check loop over targets. To add a kind: write its class,
add it to `coldstill.pipeline.targets.kinds`, and let the recipe ask for it in `coldstill.pipeline.targets.wanted`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from coldstill.cache.columns import Axis, Column
from coldstill.pipeline.models.output_head import OutputHead
from coldstill.pipeline.models.sizes import ModelSizes
from coldstill.pipeline.targets.captured import Captured, CaptureRequest
from coldstill.pipeline.targets.fisher_information import OnWords
from coldstill.pipeline.targets.live_errors import Arrays, Comparison, Difference, Live
from coldstill.pipeline.targets.row_uniforms import RowUniforms
from coldstill.pipeline.targets.transform_coding import TransformCode

# Arrays that are zero nearly everywhere, and hardly take a byte once they are compressed.
_SPARSE_ARRAYS = ("overflow", "gaps_1")


@dataclass(frozen=True)
class Encoding:
    """What a target is encoded with, beside what was captured.

    Attributes:
        column: What the target's `describe` gave.
        code: Its transform code, where it has a calibration, on the device.
        uniforms: The numbers of chance of the shard's rows.
        device: Where to compute.
    """

    column: Column
    code: TransformCode | None
    uniforms: RowUniforms
    device: torch.device


class Target(ABC):
    """One column of a store: a kind with its parameters, all of which its name says.

    Attributes:
        axis: What the column's numbers belong to: each token, or each row.
    """

    axis: ClassVar[Axis] = "token"

    @property
    @abstractmethod
    def name(self) -> str:
        """The column's name."""

    @classmethod
    @abstractmethod
    def parse(cls, name: str) -> "Target | None":
        """Return the target of a column's name; None where the name is of another kind."""

    @abstractmethod
    def describe(self, sizes: ModelSizes, code: TransformCode | None = None) -> Column:
        """Describe the column's arrays.

        Args:
            sizes: Of the teacher.
            code: The transform code, for a target with a calibration.
        """

    @property
    def stored_share(self) -> float:
        """Of all positions, the share that is stored; the bytes of others compress to nothing."""
        return 1.0

    @property
    def written_share(self) -> float:
        """Of the bytes before compression, the share that is written, as measured on real models: docs/plan.md."""
        return 1.0

    def raw_bytes(self, sizes: ModelSizes, *, num_tokens: int, num_shards: int) -> int:
        """Return the bytes of so many tokens before compression, which the column will hardly exceed."""
        total = 0.0
        for array, spec in self.describe(sizes).arrays.items():
            if array not in _SPARSE_ARRAYS:
                count = num_shards if spec.axis == "shard" else num_tokens * self.stored_share
                total += np.dtype(spec.dtype).itemsize * int(np.prod(spec.shape, dtype=np.int64)) * count
        return round(total)


class TeacherTarget(Target):
    """A column of what the teacher says.

    Attributes:
        measure: What the error of the stored values is measured in.
    """

    measure: ClassVar[str]

    @property
    @abstractmethod
    def needs(self) -> CaptureRequest:
        """What it is made of."""

    @property
    def live_needs(self) -> CaptureRequest:
        """What its stored values are held against."""
        return self.needs

    @property
    def calibration(self) -> str | None:
        """The name of the calibration that it is coded with; None where there is none."""
        return None

    def encoding_bytes(self, sizes: ModelSizes) -> int:  # noqa: ARG002
        """Return the bytes a token that encoding takes beside what was captured; 0 where they are few."""
        return 0

    @property
    def needs_stored_head(self) -> bool:
        """Whether training reads it together with the output head that the store keeps."""
        return False

    @abstractmethod
    def encode(self, captured: Captured, by: Encoding) -> dict[str, Tensor]:
        """Encode a whole shard's values, to the arrays that `describe` names.

        Raises:
            OverflowError: A value is beyond what the encoding holds.
        """

    @abstractmethod
    def live_values(self, captured: Captured) -> Tensor:
        """Return what `compare` holds stored values against, of what `live_needs` brought, [N, ...]."""

    @abstractmethod
    def compare(self, stored: Sequence[Arrays], live: Live, by: Comparison) -> Difference:
        """Compare the column of some rows, its arrays for each row, with the live values of the same rows."""

    def calibration_states(self, captured: Captured) -> Tensor:
        """Return the states [N, D] that its calibration is fitted to."""
        raise NotImplementedError(f"{self.name} has no calibration")

    def calibration_words(self, head: OutputHead) -> int:  # noqa: ARG002
        """Return how many words of the vocabulary `fit_code` goes through, which takes its time; mostly none."""
        return 0

    def fit_code(self, states_ND: Tensor, head: OutputHead, *, on_words: OnWords = lambda _: None) -> TransformCode:
        """Fit its transform code to states, which may lie on any device; tells how many words are done with."""
        raise NotImplementedError(f"{self.name} has no calibration")

    @property
    def calibration_metric(self) -> str:
        """Which errors its calibration weighs alike, for a person."""
        raise NotImplementedError(f"{self.name} has no calibration")

    def correction(self, head: OutputHead, code: TransformCode | None) -> Tensor | None:  # noqa: ARG002
        """Return what is added to logits that are rebuilt from it, [V]; None where nothing is."""
        return None


def whole(stored: Sequence[Arrays]) -> dict[str, Tensor]:
    """Lay the arrays of several rows behind one another; for columns whose arrays all are of the token axis."""
    return {name: torch.cat([row[name] for row in stored]) for name in stored[0]}


Codes = Mapping[str, TransformCode]
