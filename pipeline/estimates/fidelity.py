"""How faithful a stored logits target is: against the live teacher's whole distribution, on the same rows and student.

Three measures: the teacher's mass on the tokens that are stored, the KL from the live distribution to the rebuilt one,
and the student's gradient. The gradient is that of every parameter, summed over all rows, against what distillation
from the live teacher's whole distribution gives: that is what training sees of a target's error.
Shapes: N positions that count, C positions of a chunk, K stored tokens, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coldstill.pipeline.losses.chunked_loss import chunked_loss
from coldstill.pipeline.losses.divergences import Divergence
from coldstill.pipeline.losses.logits import Logits
from coldstill.pipeline.losses.logits_targets import FullDistribution, LogitsTarget
from coldstill.pipeline.losses.term import Predictions
from coldstill.pipeline.losses.vocabulary_losses import chunk_losses
from coldstill.pipeline.models import take_apart

_FORWARD_KL = Logits(1.0, Divergence("forward_kl"))


@dataclass(frozen=True)
class Fidelity:
    """What a stored target keeps, averaged over positions.

    Attributes:
        stored_mass: The teacher's probability of the tokens that are stored; 1 where all can be rebuilt.
        kl: KL(live || rebuilt) in nats, where tokens that are not stored share their bucket's mass equally; None where
            the target gives no distribution.
        grad_cosine: Cosine of the student's gradient with the one of live distillation.
        grad_norm_ratio: Its norm, over the norm of that one.
    """

    stored_mass: float
    kl: float | None
    grad_cosine: float
    grad_norm_ratio: float


class FidelityJudge:
    """Holds one batch of a student's graph and the live teacher's distribution beside it.

    Args:
        student: The student; its gradients are left as they were.
        inputs: `input_ids` and, where rows are padded, `attention_mask`, [B, T].
        counts_BT: Which positions count.
        teacher: The live teacher's distribution at these positions, at the temperature to judge at.
    """

    def __init__(
        self, student: PreTrainedModel, inputs: Mapping[str, Tensor], counts_BT: Tensor, teacher: FullDistribution
    ) -> None:
        parts = take_apart(student)
        self._teacher = teacher
        self._head = parts.output_head
        self._parameters = [value for value in student.parameters() if value.requires_grad]
        body = parts.body(**inputs, use_cache=False)
        self._state_ND = body.last_hidden_state[counts_BT]
        self._live = self._gradient(teacher)

    @property
    def device(self) -> torch.device:
        """Where targets have to be."""
        return self._state_ND.device

    def judge(self, target: LogitsTarget) -> Fidelity:
        """Judge one target at the same positions and temperature."""
        gradient = self._gradient(target)
        norm, live_norm = (_dot(values, values) ** 0.5 for values in (gradient, self._live))
        mass, kl = self._distribution(target)
        return Fidelity(
            stored_mass=mass,
            kl=kl,
            grad_cosine=_dot(gradient, self._live) / (norm * live_norm),
            grad_norm_ratio=norm / live_norm,
        )

    def _gradient(self, target: LogitsTarget) -> list[Tensor]:
        """Return the gradient of the forward KL, summed over positions, by each of the student's parameters."""
        # The divergence needs no tokens that follow.
        predictions = Predictions(torch.empty(0, dtype=torch.int64), target)

        def divergence_of_chunk(logits_CV: Tensor, chunk: slice) -> Tensor:
            return torch.stack(chunk_losses([_FORWARD_KL], predictions, chunk, logits_CV))

        state_ND = self._state_ND.detach().requires_grad_()
        weight_VD = self._head.weight_VD.detach().requires_grad_()
        bias_V = None if self._head.bias_V is None else self._head.bias_V.detach().requires_grad_()
        head = replace(self._head, weight_VD=weight_VD, bias_V=bias_V)
        loss, _ = chunked_loss(state_ND, head, divergence_of_chunk, torch.ones(1, device=state_ND.device))
        loss.backward()
        through_body = torch.autograd.grad(
            self._state_ND, self._parameters, state_ND.grad, retain_graph=True, allow_unused=True
        )
        own = {id(self._head.weight_VD): weight_VD.grad, id(self._head.bias_V): None if bias_V is None else bias_V.grad}
        gradients = []
        for parameter, gradient in zip(self._parameters, through_body, strict=True):
            whole = torch.zeros_like(parameter) if gradient is None else gradient
            of_head = own.get(id(parameter))
            gradients.append(whole if of_head is None else whole + of_head)
        return gradients

    @torch.no_grad()
    def _distribution(self, target: LogitsTarget) -> tuple[float, float | None]:
        """Return the stored mass and the KL from the live distribution to the rebuilt one."""
        mass, kl, count = 0.0, 0.0, len(self._state_ND)
        ids_NK, gives_all = target.token_ids, True
        for chunk in self._head.chunks(count):
            live_CV = self._teacher.logprobs(chunk)
            mass += float(len(live_CV) if ids_NK is None else live_CV.exp().gather(-1, ids_NK[chunk]).sum())
            rebuilt_CV = target.logprobs(chunk)
            gives_all &= rebuilt_CV is not None
            kl += 0.0 if rebuilt_CV is None else float(_kl(live_CV, rebuilt_CV))
        return mass / count, kl / count if gives_all else None


def _kl(logprobs_CV: Tensor, other_CV: Tensor) -> Tensor:
    return (logprobs_CV.exp() * (logprobs_CV - other_CV)).sum()


def _dot(one: list[Tensor], other: list[Tensor]) -> float:
    return sum(_products(one, other))


def _products(one: list[Tensor], other: list[Tensor]) -> Iterator[float]:
    # In float64: a hundred million products in float32 would be wrong in the third digit.
    for a, b in zip(one, other, strict=True):
        yield float((a.double() * b.double()).sum())
