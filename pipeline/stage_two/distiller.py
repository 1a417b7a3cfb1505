"""One module of student, projectors and losses, so that whatever wraps a model wraps all that is trained.

Knows tensors only: no store, no recipe, no teacher. Targets come in as they are stored and are decoded here, on the
device.
Shapes: B rows, T positions, N positions that count, C positions of a chunk, D width, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from coldstill.cache.errors import RecipeError, TargetError
from coldstill.pipeline.losses.chunked_loss import chunked_loss
from coldstill.pipeline.losses.divergences import Divergence
from coldstill.pipeline.losses.hidden_terms import HiddenForm, HiddenTerms, StoredStates
from coldstill.pipeline.losses.logits_targets import LogitsForm, LogitsTarget, StoredLogits
from coldstill.pipeline.losses.schedules import Schedule
from coldstill.pipeline.losses.vocabulary_losses import vocabulary_losses
from coldstill.pipeline.models.labels import IGNORED, next_tokens
from coldstill.pipeline.models.output_head import Head
from coldstill.pipeline.models.selective_checkpointing import SELECTIVE, enable_of, selective_kwargs
from coldstill.pipeline.models.student_forward import StudentForward
from coldstill.pipeline.recipe.loss import WEIGHT_OF_TERM
from torch import Tensor, nn
from transformers import PreTrainedModel


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
        hidden: Of block outputs, a name of `coldstill.pipeline.losses.terms.HIDDEN_LOSSES`.
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
    """How the targets of a batch are read.

    Attributes:
        logits: The kind of logits target; None where there is none.
        hidden: The form of block outputs; None where there are none.
        is_live: Whether a teacher gives them as training goes, and no store.
    """

    logits: LogitsForm | None = None
    hidden: HiddenForm | None = None
    is_live: bool = False


class Distiller(nn.Module):
    """Student and projectors in, loss and its terms out.

    Args:
        student: Any causal language model.
        projectors: One for each mapped student block, by its index as text.
        layer_map: Student block to teacher block; empty where block outputs are not learned from.
        loss: The loss.
        forms: How targets are read; what they hold of the teacher is no parameter and is never saved. None yet where a
            trainer is to get them from a live teacher.

    Raises:
        RecipeError: The layer map has too few pairs for the loss, or one without a projector.
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
        forms: TargetForms = TargetForms(),
    ) -> None:
        super().__init__()
        _check_pairs(layer_map, projectors, loss)
        self.student = student
        self.projectors = projectors
        self.layer_map = dict(layer_map)
        self.loss = loss
        self.weights = loss.weights
        self.forms = forms
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

    def check_targets(self) -> None:
        """Refuse a loss with a weighted term whose target could not be read.

        Raises:
            TargetError: There is no form of it.
        """
        for term in self._weighted("loss_logits"):
            if self.forms.logits is None:
                raise self._no_target(term, "nothing gives the teacher's logits")
        for term in self._weighted("loss_hidden", "loss_dynamics"):
            if self.forms.hidden is None:
                raise self._no_target(term, "nothing gives the outputs of the teacher's blocks")

    def state_pairs(self, batch: Mapping[str, Any], counts_BT: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Give, for each mapped pair, its projector's name, the student's states [N, Ds] and the teacher's [N, Dt].

        Args:
            batch: Arguments of `forward`.
            counts_BT: Which positions to take.
        """
        self._check_batch(batch.get("logits"), batch.get("hidden"))
        terms = self._hidden_terms()
        assert terms is not None
        outputs, _, _ = self._student(
            batch["input_ids"], batch.get("attention_mask"), list(self.layer_map), batch.get("position_ids")
        )
        return terms.pairs(outputs, batch["hidden"], counts_BT)

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
        enable_of(self.student)(own or None, **kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Do the same by the name that the Trainer of transformers before 5.23 calls."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits: StoredLogits | None = None,
        hidden: StoredStates | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            input_ids: Token ids [B, T].
            labels: As transformers has them, not shifted: the token ids [B, T], int64; `IGNORED` where a token does not
                count. None for all but padding.
            attention_mask: 1 at real positions [B, T]; None where nothing is padded.
            position_ids: Of each token [B, T]; the student's own where it is None.
            logits: By role, the arrays of each column that the logits target reads, [B, T, ...].
            hidden: By teacher block as text, the arrays of its column.
            num_items_in_batch: Positions that count in the whole accumulated batch; of this one where it is None.

        Returns:
            `loss`, which carries the gradient, and each term that has a weight at any step of the run, unweighted:
            `loss_task`, `loss_logits`, `loss_hidden` and `loss_dynamics`.

        Raises:
            TargetError: A term has a weight, and the batch lacks its target.
        """
        self._check_batch(logits, hidden)
        next_BT = next_tokens({"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask})
        outputs, state_BTD, head = self._student(input_ids, attention_mask, list(self.layer_map), position_ids)
        counts_BT = next_BT != IGNORED
        num_positions = counts_BT.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        # Where nothing counts the sums are zero, and so is the loss.
        num_positions = num_positions.clamp(min=1)
        target = None
        if self.forms.logits is not None and logits is not None and self.loss.ever("beta"):
            with torch.no_grad():
                target = self.forms.logits.read(logits, counts_BT, self.weights.temperature)
        loss, terms = self._vocabulary_loss(state_BTD[counts_BT], head, next_BT[counts_BT], target, num_positions)
        hidden_terms = self._hidden_terms()
        if hidden_terms is not None and hidden is not None:
            # A loss in half precision would be noise: whatever autocast does to the body ends here.
            with torch.autocast(device_type=input_ids.device.type, enabled=False):
                of_blocks = hidden_terms(outputs, hidden, self.projectors, counts_BT, num_positions)
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
        num_positions: Tensor,
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

    def _hidden_terms(self) -> HiddenTerms | None:
        loss = self.loss
        if self.forms.hidden is None or not (loss.ever("gamma") or loss.ever("delta")):
            return None
        hidden, dynamics = (
            name if loss.ever(weight) else None for weight, name in (("gamma", loss.hidden), ("delta", loss.dynamics))
        )
        return HiddenTerms(self.layer_map, self.forms.hidden, hidden, dynamics)

    def _check_batch(self, logits: StoredLogits | None, hidden: StoredStates | None) -> None:
        """Refuse a batch that lacks the target of a weighted term: none is ever left out without a word."""
        self.check_targets()
        roles = () if self.forms.logits is None else self.forms.logits.roles
        for term in self._weighted("loss_logits"):
            lacking = [repr(role) for role in roles if role not in (logits or {})]
            if lacking:
                raise self._no_target(term, f"a batch has no {' and no '.join(lacking)} of the teacher's logits")
        for term in self._weighted("loss_hidden", "loss_dynamics"):
            blocks = [block for block in self.layer_map.values() if str(block) not in (hidden or {})]
            if blocks:
                raise self._no_target(term, f"a batch has no output of teacher block {blocks[0]}")

    def _weighted(self, *terms: str) -> list[str]:
        return [term for term in terms if self.loss.ever(WEIGHT_OF_TERM[term])]

    def _no_target(self, term: str, lack: str) -> TargetError:
        weight = WEIGHT_OF_TERM[term]
        return TargetError(
            f"{term} has the weight {_weight_text(self.loss, weight)}, but {lack}; give the trainer a teacher_model, "
            f"or the rows of a store that has it, or set {weight} to 0"
        )

    def _weight(self, term: str) -> float:
        return float(getattr(self.weights, WEIGHT_OF_TERM[term]))


def _check_pairs(layer_map: Mapping[int, int], projectors: nn.ModuleDict, loss: Loss) -> None:
    for weight, fewest in (("gamma", 1), ("delta", 2)):
        if loss.ever(weight) and len(layer_map) < fewest:
            raise RecipeError(
                f"{_weight_text(loss, weight)} needs a layer_map of at least {fewest} pairs of student and teacher "
                f"block, got {len(layer_map)}; map more, or set {weight} to 0"
            )
    lacking = [block for block in layer_map if str(block) not in projectors]
    if lacking:
        raise RecipeError(
            f"layer_map maps student block {lacking[0]}, but there is no projector for it; projectors has: "
            f"{', '.join(projectors) or 'none'}"
        )


def _weight_text(loss: Loss, weight: str) -> str:
    schedule = loss.schedules.get(weight)
    later = "" if schedule is None else f", and {schedule.end:g} at the last step"
    return f"{weight} = {getattr(loss.weights, weight):g}{later}"
