"""One module of student, projectors and losses, so that whatever wraps a model wraps all that is trained.

Knows tensors only: no store, no recipe. Targets come in as they are stored and are decoded here, on the device.
Shapes: B rows, T positions, N positions that count, C positions of a chunk, D width, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.losses.chunked_loss import chunked_loss
from pipeline.losses.divergences import Divergence
from pipeline.losses.hidden_terms import HiddenForm, HiddenTerms, StoredStates
from pipeline.losses.logits_targets import LogitsForm, LogitsTarget, StoredLogits
from pipeline.losses.schedules import Schedule
from pipeline.losses.vocabulary_losses import vocabulary_losses
from pipeline.output_head import Head
from pipeline.selective_checkpointing import SELECTIVE, selective_kwargs
from pipeline.student_forward import StudentForward

IGNORED = -100
# The terms of the loss, and what the recipe calls the weight of each.
WEIGHT_OF_TERM = {"loss_task": "alpha", "loss_logits": "beta", "loss_hidden": "gamma", "loss_dynamics": "delta"}


@dataclass(frozen=True)
class LossWeights:
    """The loss: alpha * task + beta * logits + gamma * hidden + delta * dynamics, at one step.

    Attributes:
        alpha: Weight of the cross entropy.
        beta: Weight of the divergence times temperature squared.
        gamma: Weight of the hidden loss.
        temperature: Of the divergence.
        delta: Weight of the loss of changes between mapped blocks.
    """

    alpha: float
    beta: float
    gamma: float
    temperature: float
    delta: float = 0.0


@dataclass(frozen=True)
class Loss:
    """The loss over a whole run.

    Attributes:
        weights: At the first step.
        schedules: Of the weights that change, by name.
        divergence: Of the student's distribution from the teacher's.
        hidden: Of block outputs, a name of `pipeline.losses.terms.HIDDEN_LOSSES`.
        dynamics: Of their changes, one too.
    """

    weights: LossWeights
    divergence: Divergence
    hidden: str = "mse"
    dynamics: str = "cosine"
    schedules: Mapping[str, Schedule] = field(default_factory=dict)

    def at(self, step: int, num_steps: int) -> LossWeights:
        """Give the weights at a step, counted from 0, of a run of so many."""
        return replace(self.weights, **{name: value.at(step, num_steps) for name, value in self.schedules.items()})

    def ever(self, weight: str) -> bool:
        """Whether a weight is above 0 at any step."""
        schedule = self.schedules.get(weight)
        return getattr(self.weights, weight) > 0 or (schedule is not None and schedule.end > 0)


@dataclass(frozen=True)
class TargetForms:
    """How the stored targets of a batch are read.

    Attributes:
        logits: The kind of logits target; None where there is none.
        hidden: How block outputs are stored; None where there are none.
    """

    logits: LogitsForm | None = None
    hidden: HiddenForm | None = None


class Distiller(nn.Module):
    """Student and projectors in, loss and its terms out.

    Args:
        student: Any causal language model.
        projectors: One for each mapped student block, by its index as text.
        layer_map: Student block to teacher block; empty where block outputs are not learned from.
        loss: The loss.
        forms: How stored targets are read; what they hold of the teacher is no parameter and is never saved.
    """

    # Tells the Trainer that `forward` divides by the number of positions of the whole accumulated batch.
    accepts_loss_kwargs = True

    def __init__(
        self,
        student: PreTrainedModel,
        projectors: nn.ModuleDict,
        *,
        layer_map: Mapping[int, int],
        loss: Loss,
        forms: TargetForms,
    ) -> None:
        super().__init__()
        self.student = student
        self.projectors = projectors
        self.layer_map = dict(layer_map)
        self.loss = loss
        self.weights = loss.weights
        self.forms = forms
        self._hidden_terms = _hidden_terms(self.layer_map, loss, forms)
        self._student = StudentForward(student)

    @property
    def config(self) -> Any:
        """The student's config, which the Trainer and its integrations read."""
        return self.student.config

    def get_input_embeddings(self) -> nn.Module:
        """The student's token embeddings, which the Trainer adds noise to where `neftune_noise_alpha` asks for it."""
        return self.student.get_input_embeddings()

    def set_step(self, step: int, num_steps: int) -> None:
        """Take the weights and the temperature of a step, counted from 0, of a run of so many."""
        self.weights = self.loss.at(step, num_steps)

    def state_pairs(
        self, input_ids: Tensor, attention_mask: Tensor | None, hidden: StoredStates, counts_BT: Tensor
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Give, for each mapped pair, its projector's name, the student's states [N, Ds] and the teacher's [N, Dt]."""
        assert self._hidden_terms is not None
        outputs, _, _ = self._student(input_ids, attention_mask, list(self.layer_map))
        return self._hidden_terms.pairs(outputs, hidden, counts_BT)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Trade compute for memory in the student's blocks; what the hidden loss reads stays in the graph.

        Args:
            activation_checkpointing_kwargs: Of `torch.utils.checkpoint.checkpoint`; or `selective`, to compute only
                cheap operations again.
            kwargs: Passed on to the student.
        """
        own = dict(activation_checkpointing_kwargs or {})
        if own.pop(SELECTIVE, False):
            own |= selective_kwargs()
        self.student.activation_checkpointing_enable(activation_checkpointing_kwargs=own or None, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        logits: StoredLogits | None = None,
        hidden: StoredStates | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            input_ids: Token ids [B, T].
            labels: The token that follows each position [B, T], int64; `IGNORED` where it does not count.
            attention_mask: 1 at real positions [B, T]; None where nothing is padded.
            logits: By role, the arrays of each column that the logits target reads, [B, T, ...].
            hidden: By teacher block as text, the arrays of its column.
            num_items_in_batch: Positions that count in the whole accumulated batch; of this one where it is None.

        Returns:
            `loss`, which carries the gradient, and each term that has a weight at any step of the run, unweighted:
            `loss_task`, `loss_logits`, `loss_hidden` and `loss_dynamics`.
        """
        outputs, state_BTD, head = self._student(input_ids, attention_mask, list(self.layer_map))
        counts_BT = labels != IGNORED
        num_positions = counts_BT.sum() if num_items_in_batch is None else num_items_in_batch
        target = None
        if self.loss.ever("beta") and logits is not None and self.forms.logits is not None:
            with torch.no_grad():
                target = self.forms.logits.read(logits, counts_BT, self.weights.temperature)
        loss, terms = self._vocabulary_loss(state_BTD[counts_BT], head, labels[counts_BT], target, num_positions)
        if self._hidden_terms is not None and hidden is not None:
            # A loss in half precision would be noise: whatever autocast does to the body ends here.
            with torch.autocast(device_type=input_ids.device.type, enabled=False):
                of_blocks = self._hidden_terms(outputs, hidden, self.projectors, counts_BT, num_positions)
            for name, term in of_blocks.items():
                loss = loss + self._weight(name) * term
            terms |= of_blocks
        return {"loss": loss, **terms}

    def _vocabulary_loss(
        self,
        state_ND: Tensor,
        head: Head,
        next_tokens_N: Tensor,
        target: LogitsTarget | None,
        num_positions: Tensor | int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Give the weighted sum of the terms over the vocabulary, with its gradient, and each term."""
        names = ["loss_task"] * self.loss.ever("alpha") + ["loss_logits"] * (target is not None)
        if not names:
            return state_ND.new_zeros((), dtype=torch.float32), {}

        scales = {"loss_task": 1.0, "loss_logits": self.weights.temperature**2}
        scale = torch.tensor([scales[name] for name in names], device=state_ND.device) / num_positions

        def terms_of_chunk(logits_CV: Tensor, chunk: slice) -> Tensor:
            losses = vocabulary_losses(
                logits_CV,
                chunk=chunk,
                next_tokens_C=next_tokens_N[chunk] if "loss_task" in names else None,
                target=target,
                divergence=self.loss.divergence,
                overwrites=not head.keeps_logits,
            )
            return torch.stack(losses) * scale

        weights = torch.tensor([self._weight(name) for name in names], device=state_ND.device)
        loss, terms = chunked_loss(state_ND, head, terms_of_chunk, weights)
        return loss, dict(zip(names, terms.unbind(), strict=True))

    def _weight(self, term: str) -> float:
        return float(getattr(self.weights, WEIGHT_OF_TERM[term]))


def _hidden_terms(layer_map: Mapping[int, int], loss: Loss, forms: TargetForms) -> HiddenTerms | None:
    if forms.hidden is None or not (loss.ever("gamma") or loss.ever("delta")):
        return None
    hidden, dynamics = (
        name if loss.ever(weight) else None for weight, name in (("gamma", loss.hidden), ("delta", loss.dynamics))
    )
    return HiddenTerms(layer_map, forms.hidden, hidden, dynamics)
