"""The teacher's distribution from what a store holds of it, as events beside the student's.

One class for each kind: the largest logits and one bucket for the rest; the largest logits and draws from the tail; the
final state and the output head, which give every token. How stored columns are read to one of these is
`coldstill.pipeline.targets.forms`'.
Shapes: N positions that count, C positions of a chunk, K stored tokens, M draws, D width, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from coldstill.pipeline.losses.divergences import Events
from coldstill.pipeline.losses.student_logits import Request, StudentEvents
from coldstill.pipeline.models.output_head import OutputHead


class LogitsTarget(Protocol):
    """The teacher's next-token distribution, or what is known of it, at the N positions of a batch that count."""

    @property
    def temperature(self) -> float:
        """What logits are divided by."""

    @property
    def token_ids(self) -> Tensor | None:
        """The tokens whose probabilities are known one by one, [N, K] in int64; None where those of all are."""

    def request(self, chunk: slice, *, of_forward_kl: bool) -> Request | None:
        """Say what to take of the student's logits at some of the positions; None for all of them.

        Args:
            chunk: The positions.
            of_forward_kl: Whether KL(teacher || student) is all that is wanted, so that the target may ask for that
                number itself, and no events.
        """

    def events(self, chunk: slice, student: StudentEvents) -> Events:
        """Return the events of some of the positions, of what was taken of the student there."""

    def logprobs(self, chunk: slice) -> Tensor | None:
        """Return the distribution over every token at some of the positions, [C, V]; None where it says none."""


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

    def request(self, chunk: slice, *, of_forward_kl: bool) -> Request:  # noqa: ARG002 - the protocol's signature
        """Ask for the K tokens, and for all others together unless the vocabulary has no more."""
        has_rest = self.top_ids_NK.shape[-1] < self.vocab_size
        return Request(self.temperature, self.top_ids_NK[chunk], has_rest=has_rest)

    def events(self, chunk: slice, student: StudentEvents) -> Events:
        """Return K + 1 events; K where nothing was taken of the other tokens."""
        assert student.normaliser_C is not None
        num_tokens = self.top_ids_NK.shape[-1]
        normaliser_C1 = student.normaliser_C.unsqueeze(-1)
        student_CK = student.logits_CE / self.temperature - normaliser_C1
        if student.rest_C is None:
            return Events(self._stored_logprobs(chunk), student_CK, num_tokens=num_tokens)
        rest_logprob_C1 = student.rest_C.unsqueeze(-1) - normaliser_C1
        return Events(
            self._logprobs_with_rest(chunk), torch.cat([student_CK, rest_logprob_C1], dim=-1), num_tokens=num_tokens
        )

    def logprobs(self, chunk: slice) -> Tensor:
        """Return the distribution in which the tokens that are not stored share their bucket's mass equally, [C, V]."""
        ids_CK = self.top_ids_NK[chunk]
        num_rest = self.vocab_size - ids_CK.shape[-1]
        if num_rest == 0:
            stored_CK = self._stored_logprobs(chunk)
            return stored_CK.new_empty(len(ids_CK), self.vocab_size).scatter_(-1, ids_CK, stored_CK)
        logprobs_CE = self._logprobs_with_rest(chunk)
        rest_C1 = logprobs_CE[:, -1:] - math.log(num_rest)
        return rest_C1.expand(-1, self.vocab_size).scatter(-1, ids_CK, logprobs_CE[:, :-1])

    def _stored_logprobs(self, chunk: slice) -> Tensor:
        return self.top_logits_NK[chunk] / self.temperature - self.log_normaliser_N[chunk].unsqueeze(-1)

    def _logprobs_with_rest(self, chunk: slice) -> Tensor:
        teacher_CK = self._stored_logprobs(chunk)
        stored_C1 = teacher_CK.exp().sum(dim=-1, keepdim=True)
        rest_C1 = (1.0 - stored_C1).clamp(min=torch.finfo(torch.float32).tiny)
        # Rounded stored logits may sum to a little over one; divided by their total they are a distribution again.
        return torch.cat([teacher_CK, rest_C1.log()], dim=-1) - (stored_C1 + rest_C1).log()


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

    def request(self, chunk: slice, *, of_forward_kl: bool) -> Request:  # noqa: ARG002 - the protocol's signature
        """Ask for the K tokens and the M draws, which stand for all others."""
        return Request(self.temperature, self.ids_NE[chunk])

    def events(self, chunk: slice, student: StudentEvents) -> Events:
        """Return K + M weighted events."""
        assert student.normaliser_C is not None
        student_CE = student.logits_CE / self.temperature - student.normaliser_C.unsqueeze(-1)
        teacher_CE = self.logits_NE[chunk] / self.temperature - self.log_normaliser_N[chunk].unsqueeze(-1)
        return Events(teacher_CE, student_CE, self.weights_NE[chunk], self.num_tokens)

    def logprobs(self, _chunk: slice) -> None:
        """Return nothing: draws say sums over the tail, and no token's probability."""


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
        """None: every token's probability is known."""

    @torch.no_grad()
    def logits(self, chunk: slice) -> Tensor:
        """Return the teacher's logits of some of the positions, [C, V], undivided."""
        logits_CV = self.head(self.state_ND[chunk])
        if self.correction_V is not None:
            logits_CV += self.correction_V / self.temperature
        return logits_CV

    def logprobs(self, chunk: slice) -> Tensor:
        """Return the teacher's log-probabilities of some of the positions, [C, V]."""
        return self.logits(chunk).div_(self.temperature).log_softmax(dim=-1)

    def request(self, chunk: slice, *, of_forward_kl: bool) -> Request | None:
        """Ask for the KL itself where that is all that is wanted, and for all logits elsewhere."""
        return Request(self.temperature, teacher_logits_CV=self.logits(chunk)) if of_forward_kl else None

    def events(self, chunk: slice, student: StudentEvents) -> Events:
        """Return V events, of all of the student's logits."""
        logits_CV = student.logits_CE.to(torch.promote_types(student.logits_CE.dtype, torch.float32))
        return Events(self.logprobs(chunk), (logits_CV / self.temperature).log_softmax(dim=-1))
