"""The teacher's distribution from what a store holds of it, as events beside the student's.

One class for each kind: the largest logits and one bucket for the rest; the largest logits and draws from the tail; the
final state and the output head, which give every token. All are at one temperature, that of the loss.
Shapes: N positions that count, C positions of a chunk, K stored tokens, M draws, D width, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from pipeline.divergences import Events
from pipeline.encodings import StateForm, decode_state
from pipeline.output_head import OutputHead
from pipeline.token_encodings import decode_tail, decode_topk
from pipeline.transform_coding import TransformCode

# What a batch calls the columns of the logits.
TOPK, NORMALISER, TAIL, FINAL = "topk", "logsumexp", "tail", "final"

StoredLogits = Mapping[str, Mapping[str, Tensor]]


class LogitsTarget(Protocol):
    """The teacher's distribution at the N positions of a batch that count."""

    @property
    def token_ids(self) -> Tensor | None:
        """The tokens that are stored exactly, [N, K] in int64; None where that is all of them."""

    def events(self, chunk: slice, student_logits_CV: Tensor) -> Events:
        """Give the events of some of the positions, with the student's logits there in float32, undivided."""


class LogitsForm(Protocol):
    """How a recipe's kind of logits target is read."""

    def read(self, stored: StoredLogits, counts_BT: Tensor) -> LogitsTarget:
        """Decode a batch's columns, [B, T, ...] by role and array, at the positions that count."""


@dataclass(frozen=True)
class BucketedForm:
    """Kind `topk`: the K likeliest tokens, and one bucket for the rest, whose mass the normaliser gives exactly.

    Attributes:
        k: How many of the stored tokens to read.
        temperature: Of the loss.
    """

    k: int
    temperature: float

    def read(self, stored: StoredLogits, counts_BT: Tensor) -> "BucketedTopk":
        """Decode a batch's columns."""
        top_logits, top_ids = decode_topk(_at(stored[TOPK], counts_BT), k=self.k)
        return BucketedTopk(top_logits, top_ids, stored[NORMALISER]["values"][counts_BT], self.temperature)


@dataclass(frozen=True)
class BucketedTopk:
    """The K likeliest tokens and a bucket.

    Attributes:
        top_logits_NK: The teacher's largest logits, at temperature 1.
        top_ids_NK: Their token ids, int64, all different.
        log_normaliser_N: The teacher's logsumexp over the whole vocabulary of logits / temperature.
        temperature: What logits are divided by.
    """

    top_logits_NK: Tensor
    top_ids_NK: Tensor
    log_normaliser_N: Tensor
    temperature: float

    @property
    def token_ids(self) -> Tensor:
        """The K tokens."""
        return self.top_ids_NK

    def events(self, chunk: slice, student_logits_CV: Tensor) -> Events:
        """Give K + 1 events; K where the vocabulary has no more."""
        ids_CK = self.top_ids_NK[chunk]
        logits_CV = student_logits_CV / self.temperature
        normaliser_C1 = logits_CV.logsumexp(dim=-1, keepdim=True)
        student_CK = logits_CV.gather(-1, ids_CK) - normaliser_C1
        teacher_CK = self.top_logits_NK[chunk] / self.temperature - self.log_normaliser_N[chunk].unsqueeze(-1)
        if ids_CK.shape[-1] == logits_CV.shape[-1]:
            return Events(teacher_CK, student_CK, num_tokens=ids_CK.shape[-1])
        stored_C1 = teacher_CK.exp().sum(dim=-1, keepdim=True)
        rest_C1 = (1.0 - stored_C1).clamp(min=torch.finfo(torch.float32).tiny)
        # Rounded stored logits may sum to a little over one; divided by their total they are a distribution again.
        teacher_CE = torch.cat([teacher_CK, rest_C1.log()], dim=-1) - (stored_C1 + rest_C1).log()
        # The rest's logsumexp is taken over the rest itself: one minus the stored mass would lose all its digits
        # where the student is sure.
        rest_logprob_C1 = logits_CV.scatter(-1, ids_CK, -torch.inf).logsumexp(dim=-1, keepdim=True) - normaliser_C1
        return Events(teacher_CE, torch.cat([student_CK, rest_logprob_C1], dim=-1), num_tokens=ids_CK.shape[-1])


@dataclass(frozen=True)
class SampledForm:
    """Kind `topk_sampled`: the K likeliest tokens exactly, and M draws from the tail with importance weights.

    Attributes:
        k: How many of the likeliest tokens there are; the tail begins behind them.
        temperature: Of the loss.
    """

    k: int
    temperature: float

    def read(self, stored: StoredLogits, counts_BT: Tensor) -> "SampledTail":
        """Decode a batch's columns."""
        head_logits, head_ids = decode_topk(_at(stored[TOPK], counts_BT), k=self.k)
        tail_logits, tail_ids, log_weights = decode_tail(_at(stored[TAIL], counts_BT))
        return SampledTail(
            logits_NE=torch.cat([head_logits, tail_logits], dim=-1),
            ids_NE=torch.cat([head_ids, tail_ids], dim=-1),
            weights_NE=torch.cat([torch.ones_like(head_logits), log_weights.exp()], dim=-1),
            log_normaliser_N=stored[NORMALISER]["values"][counts_BT],
            num_tokens=self.k,
            temperature=self.temperature,
        )


@dataclass(frozen=True)
class SampledTail:
    """The K likeliest tokens and M draws, E together.

    Random sampling knowledge distillation (arXiv 2503.16870) with an exact head.

    Attributes:
        logits_NE: The teacher's logits, at temperature 1.
        ids_NE: Token ids, int64; a draw may stand twice.
        weights_NE: 1 for each of the head, the importance weight 1 / (M * probability of the draw) in the tail.
        log_normaliser_N: The teacher's logsumexp over the whole vocabulary of logits / temperature.
        num_tokens: K.
        temperature: What logits are divided by.
    """

    logits_NE: Tensor
    ids_NE: Tensor
    weights_NE: Tensor
    log_normaliser_N: Tensor
    num_tokens: int
    temperature: float

    @property
    def token_ids(self) -> Tensor:
        """The K likeliest tokens; a draw stands for others too."""
        return self.ids_NE[:, : self.num_tokens]

    def events(self, chunk: slice, student_logits_CV: Tensor) -> Events:
        """Give K + M weighted events."""
        logits_CV = student_logits_CV / self.temperature
        student_CE = logits_CV.gather(-1, self.ids_NE[chunk]) - logits_CV.logsumexp(dim=-1, keepdim=True)
        teacher_CE = self.logits_NE[chunk] / self.temperature - self.log_normaliser_N[chunk].unsqueeze(-1)
        return Events(teacher_CE, student_CE, self.weights_NE[chunk], self.num_tokens)


@dataclass(frozen=True)
class FinalForm:
    """Kind `final`: the post-norm last state and the output head, which give the distribution over every token.

    Attributes:
        form: How the states are stored.
        head: The teacher's output head.
        temperature: Of the loss.
        code: The states' transform code, where they are coded.
        correction_V: What is added to the logits at temperature 1 for the states' rounding, divided by T^2 at T.
    """

    form: StateForm
    head: OutputHead
    temperature: float
    code: TransformCode | None = None
    correction_V: Tensor | None = None
    _copies: dict[torch.device, "FinalForm"] = field(default_factory=dict, repr=False, compare=False)

    def read(self, stored: StoredLogits, counts_BT: Tensor) -> "FullDistribution":
        """Decode a batch's columns."""
        own = self.on(counts_BT.device)
        state_ND = decode_state(stored[FINAL], form=own.form, code=own.code)[counts_BT]
        return FullDistribution(state_ND, own.head, own.temperature, own.correction_V)

    def on(self, device: torch.device) -> "FinalForm":
        """Give the form with what it holds on a device, which it is brought to once."""
        if self.head.weight_VD.device == device:
            return self
        if device not in self._copies:
            code = None if self.code is None else self.code.to(device)
            correction_V = None if self.correction_V is None else self.correction_V.to(device)
            self._copies[device] = replace(self, head=self.head.to(device), code=code, correction_V=correction_V)
        return self._copies[device]


@dataclass(frozen=True)
class FullDistribution:
    """Every token, rebuilt from the final state; the logits of all positions never exist at once.

    Attributes:
        state_ND: The teacher's post-norm last state.
        head: Its output head.
        temperature: What logits are divided by.
        correction_V: What is added to the logits at temperature 1, or None.
    """

    state_ND: Tensor
    head: OutputHead
    temperature: float
    correction_V: Tensor | None = None

    @property
    def token_ids(self) -> None:
        """Every token is there."""
        return

    def logprobs(self, chunk: slice) -> Tensor:
        """Give the teacher's log-probabilities of some of the positions, [C, V]."""
        logits_CV = self.head(self.state_ND[chunk]).div_(self.temperature)
        if self.correction_V is not None:
            logits_CV += self.correction_V / self.temperature**2
        return logits_CV.log_softmax(dim=-1)

    def events(self, chunk: slice, student_logits_CV: Tensor) -> Events:
        """Give V events."""
        with torch.no_grad():
            teacher_CV = self.logprobs(chunk)
        return Events(teacher_CV, (student_logits_CV / self.temperature).log_softmax(dim=-1))


def _at(arrays: Mapping[str, Tensor], counts_BT: Tensor) -> dict[str, Tensor]:
    return {name: values[counts_BT] for name, values in arrays.items()}
