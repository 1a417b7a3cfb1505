"""The teacher's distribution from what a store holds of it, as events beside the student's.

One class for each kind: the largest logits and one bucket for the rest; the largest logits and draws from the tail; the
final state and the output head, which give every token. How stored columns are read to one of these is
`coldstill.pipeline.targets.forms`'.
Shapes: N positions that count, C positions of a chunk, K stored tokens, M draws, D width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from coldstill.pipeline.losses.divergences import Events
from coldstill.pipeline.models.output_head import OutputHead
from torch import Tensor


@dataclass(frozen=True)
class StudentEvents:
    """What events take of the student at a chunk of positions, in float32 and with its gradient.

    Attributes:
        logits_CE: Its logits of the target's tokens, undivided.
        normaliser_C: Its logsumexp over the vocabulary of logits / temperature.
        rest_C: The same over all but the target's tokens; None where the target has no use for it.
    """

    logits_CE: Tensor
    normaliser_C: Tensor
    rest_C: Tensor | None = None


class ChosenTokens(Protocol):
    """The teacher's probabilities of some tokens, at the N positions of a batch that count."""

    @property
    def temperature(self) -> float:
        """What logits are divided by."""

    @property
    def token_ids(self) -> Tensor:
        """The tokens that are stored exactly, [N, K] in int64."""

    @property
    def event_ids(self) -> Tensor:
        """The tokens that are compared, [N, E] in int64."""

    @property
    def has_rest(self) -> bool:
        """Whether all tokens but these, which are all different, are one more event."""

    def events(self, chunk: slice, student: StudentEvents) -> Events:
        """Give the events of some of the positions."""


@dataclass(frozen=True)
class BucketedTopk:
    """The K likeliest tokens and a bucket.

    Attributes:
        top_logits_NK: The teacher's largest logits, at temperature 1.
        top_ids_NK: Their token ids, int64, all different.
        log_normaliser_N: The teacher's logsumexp over the whole vocabulary of logits / temperature.
        temperature: What logits are divided by.
        vocab_size: V.
    """

    top_logits_NK: Tensor
    top_ids_NK: Tensor
    log_normaliser_N: Tensor
    temperature: float
    vocab_size: int

    @property
    def token_ids(self) -> Tensor:
        """The K tokens."""
        return self.top_ids_NK

    @property
    def event_ids(self) -> Tensor:
        """The K tokens."""
        return self.top_ids_NK

    @property
    def has_rest(self) -> bool:
        """Whether the bucket is an event: it is, unless the vocabulary has no more tokens."""
        return self.top_ids_NK.shape[-1] < self.vocab_size

    def events(self, chunk: slice, student: StudentEvents) -> Events:
        """Give K + 1 events; K where the vocabulary has no more."""
        num_tokens = self.top_ids_NK.shape[-1]
        normaliser_C1 = student.normaliser_C.unsqueeze(-1)
        student_CK = student.logits_CE / self.temperature - normaliser_C1
        teacher_CK = self.top_logits_NK[chunk] / self.temperature - self.log_normaliser_N[chunk].unsqueeze(-1)
        if student.rest_C is None:
            return Events(teacher_CK, student_CK, num_tokens=num_tokens)
        stored_C1 = teacher_CK.exp().sum(dim=-1, keepdim=True)
        rest_C1 = (1.0 - stored_C1).clamp(min=torch.finfo(torch.float32).tiny)
        # Rounded stored logits may sum to a little over one; divided by their total they are a distribution again.
        teacher_CE = torch.cat([teacher_CK, rest_C1.log()], dim=-1) - (stored_C1 + rest_C1).log()
        rest_logprob_C1 = student.rest_C.unsqueeze(-1) - normaliser_C1
        return Events(teacher_CE, torch.cat([student_CK, rest_logprob_C1], dim=-1), num_tokens=num_tokens)


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

    @property
    def event_ids(self) -> Tensor:
        """The K tokens and the M draws."""
        return self.ids_NE

    @property
    def has_rest(self) -> bool:
        """Whether there is a bucket: the draws stand for all others."""
        return False

    def events(self, chunk: slice, student: StudentEvents) -> Events:
        """Give K + M weighted events."""
        student_CE = student.logits_CE / self.temperature - student.normaliser_C.unsqueeze(-1)
        teacher_CE = self.logits_NE[chunk] / self.temperature - self.log_normaliser_N[chunk].unsqueeze(-1)
        return Events(teacher_CE, student_CE, self.weights_NE[chunk], self.num_tokens)


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

    @torch.no_grad()
    def logits(self, chunk: slice) -> Tensor:
        """Give the teacher's logits of some of the positions, [C, V], undivided."""
        logits_CV = self.head(self.state_ND[chunk])
        if self.correction_V is not None:
            logits_CV += self.correction_V / self.temperature
        return logits_CV

    def logprobs(self, chunk: slice) -> Tensor:
        """Give the teacher's log-probabilities of some of the positions, [C, V]."""
        return self.logits(chunk).div_(self.temperature).log_softmax(dim=-1)

    def events(self, chunk: slice, student_logits_CV: Tensor) -> Events:
        """Give V events, with the student's logits in float32, undivided."""
        return Events(self.logprobs(chunk), (student_logits_CV / self.temperature).log_softmax(dim=-1))


# The teacher's distribution at the N positions of a batch that count.
LogitsTarget = ChosenTokens | FullDistribution
