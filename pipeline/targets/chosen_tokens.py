"""Targets of some tokens of the distribution: the largest logits, and draws from the tail.

Shapes: N positions of some rows, K stored tokens.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coldstill.cache.columns import Column
from coldstill.pipeline.models.sizes import ModelSizes
from coldstill.pipeline.targets.captured import Captured, CaptureRequest, TailRequest
from coldstill.pipeline.targets.live_errors import NATS, Arrays, Comparison, Difference, Live, logits_of
from coldstill.pipeline.targets.target import Encoding, TeacherTarget, whole
from coldstill.pipeline.targets.token_encodings import (
    LOGIT_STEP,
    decode_tail,
    decode_topk,
    encode_tail,
    encode_topk,
    tail_column,
    topk_column,
)
from coldstill.pipeline.targets.transform_coding import TransformCode

_TOPK, _TAIL = "logits/topk/", "logits/tail/"


class _ChosenTokens(TeacherTarget):
    """Logits of tokens whose ids are stored beside them: held against the live logits of the same tokens."""

    measure = NATS

    @property
    def live_needs(self) -> CaptureRequest:
        """The final state: by it the live logits of whichever tokens are stored are made."""
        return CaptureRequest(final_state=True)

    def live_values(self, captured: Captured) -> Tensor:
        """Return the final states, [N, D]."""
        assert captured.final_state_ND is not None, "the request asked for it"
        return captured.final_state_ND

    def compare(self, stored: Sequence[Arrays], live: Live, by: Comparison) -> Difference:
        """Compare with the live logits of the same tokens, and of the same rank where they are ranked."""
        arrays = whole(stored)
        logits_NK, ids_NK = self._tokens(arrays)
        ranks = logits_NK.shape[-1] if self._is_ranked else 0
        alone_NK, ranked_NK = logits_of(by.head, live[0], ids_NK, k=ranks)
        together_NK, _ = logits_of(by.head, live[1], ids_NK)
        apart_NK = (logits_NK - alone_NK).abs()
        if self._is_ranked:
            apart_NK = torch.maximum(apart_NK, (logits_NK - ranked_NK).abs())
        kept_N = torch.ones(len(ids_NK), dtype=torch.bool, device=ids_NK.device)
        stated = 0.0 if "values" in arrays else LOGIT_STEP / 2
        return by.of_logits(apart_NK, together_NK - alone_NK, alone_NK, kept_N=kept_N, stated=stated)

    @abstractmethod
    def _tokens(self, arrays: Arrays) -> tuple[Tensor, Tensor]:
        """Decode logits and token ids, [N, K]."""

    @property
    @abstractmethod
    def _is_ranked(self) -> bool:
        """Whether the tokens are the likeliest ones, in order."""


@dataclass(frozen=True)
class LargestLogits(_ChosenTokens):
    """The k largest logits and their token ids.

    Attributes:
        k: How many.
        values: `delta`, in whole steps, or `float32`, exactly.
    """

    k: int
    values: str

    @property
    def name(self) -> str:
        """The column's name."""
        return f"{_TOPK}{self.k}/{self.values}"

    @classmethod
    def parse(cls, name: str) -> "LargestLogits | None":
        """Read the column's name."""
        if not name.startswith(_TOPK):
            return None
        k, values = name.removeprefix(_TOPK).split("/")
        return cls(int(k), values)

    @property
    def needs(self) -> CaptureRequest:
        """The k largest logits."""
        return CaptureRequest(ks=(self.k,))

    @property
    def written_share(self) -> float:
        """As measured: docs/plan.md."""
        return 0.72 if self.values == "delta" else 0.85

    def describe(self, sizes: ModelSizes, code: TransformCode | None = None) -> Column:  # noqa: ARG002
        """Describe the column that `encode` fills."""
        return topk_column(self.name, k=self.k, values=self.values, vocab_size=sizes.vocab_size)

    def encode(self, captured: Captured, by: Encoding) -> dict[str, Tensor]:
        """Encode logits and ids."""
        return encode_topk(*captured.top_NK[self.k], column=by.column)

    def _tokens(self, arrays: Arrays) -> tuple[Tensor, Tensor]:
        return decode_topk(arrays, k=self.k)

    @property
    def _is_ranked(self) -> bool:
        return True


@dataclass(frozen=True)
class TailDraws(_ChosenTokens):
    """Draws from what lies beyond the likeliest tokens, with their importance weights.

    Attributes:
        k: The tail begins behind so many likeliest tokens.
        num_draws: Draws a position.
        temperatures: What the draws are fit for, ascending.
    """

    k: int
    num_draws: int
    temperatures: tuple[float, ...]

    @property
    def name(self) -> str:
        """The column's name."""
        temperatures = "_".join(f"{temperature:g}" for temperature in self.temperatures)
        return f"{_TAIL}{self.k}_{self.num_draws}/{temperatures}"

    @classmethod
    def parse(cls, name: str) -> "TailDraws | None":
        """Read the column's name."""
        if not name.startswith(_TAIL):
            return None
        counts, temperatures = name.removeprefix(_TAIL).split("/")
        k, num_draws = counts.split("_")
        return cls(int(k), int(num_draws), tuple(map(float, temperatures.split("_"))))

    @property
    def needs(self) -> CaptureRequest:
        """The draws."""
        return CaptureRequest(tails=(self._request,))

    @property
    def written_share(self) -> float:
        """As measured: docs/plan.md."""
        return 0.74

    def describe(self, sizes: ModelSizes, code: TransformCode | None = None) -> Column:  # noqa: ARG002
        """Describe the column that `encode` fills."""
        return tail_column(self.name, num_draws=self.num_draws, vocab_size=sizes.vocab_size)

    def encode(self, captured: Captured, by: Encoding) -> dict[str, Tensor]:
        """Encode logits, ids and log-weights."""
        return encode_tail(*captured.tail_NM[self._request], column=by.column)

    def _tokens(self, arrays: Arrays) -> tuple[Tensor, Tensor]:
        return decode_tail(arrays)[:2]

    @property
    def _is_ranked(self) -> bool:
        return False

    @property
    def _request(self) -> TailRequest:
        return TailRequest(self.k, self.num_draws, self.temperatures)
