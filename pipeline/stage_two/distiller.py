"""One module of student, projectors and losses, so that whatever wraps a model wraps all that is trained.

Knows tensors only: no store, no recipe, no teacher. Targets come in as they are stored and are decoded here, on the
device.
Shapes: B rows, T positions, N positions that count, C positions of a chunk, D width, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coldstill.pipeline.losses.block_losses import MappedStates, block_losses
from coldstill.pipeline.losses.objective import Objective
from coldstill.pipeline.losses.state_losses import BlockScales
from coldstill.pipeline.losses.term import Predictions, Term
from coldstill.pipeline.losses.vocabulary_losses import vocabulary_loss
from coldstill.pipeline.models.counted import COUNTED_STATES, at, counted_of, places_of
from coldstill.pipeline.models.labels import counts_of, next_tokens, weights_of
from coldstill.pipeline.models.output_head import Head
from coldstill.pipeline.models.selective_checkpointing import SELECTIVE, enable_of, selective_kwargs
from coldstill.pipeline.models.student_forward import StudentForward
from coldstill.pipeline.recipe.loss import TargetName
from coldstill.pipeline.runtime.errors import DataError, RecipeError, TargetError
from coldstill.pipeline.targets.forms import HiddenForm, LogitsForm, StoredLogits, StoredStates

# Enough for the variance of a channel.
_SCALE_POSITIONS = 4096
# As errors name them.
_TARGETS: Mapping[TargetName, str] = {
    "logits": "the teacher's logits",
    "hidden": "the outputs of the teacher's blocks",
}


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

    It runs the student once for what the terms need, hands them that, and adds them up.

    Args:
        student: Any causal language model.
        projectors: One for each mapped student block, by its index as text.
        layer_map: Student block to teacher block; empty where block outputs are not learned from.
        objective: The terms of the loss, with their weights.
        forms: How targets are read; what they hold of the teacher is no parameter and is never saved. None yet where a
            trainer is to get them from a live teacher.

    Attributes:
        now: The objective with the weights and the temperature of this step.
        factors: What the weights are multiplied by, by term; none unless they are balanced.
        scales: Of the teacher's blocks, once they are measured.

    Raises:
        RecipeError: The layer map has too few pairs for a term, or one without a projector.
    """

    # Tells the Trainer that `forward` divides by the number of positions of the whole accumulated batch.
    accepts_loss_kwargs = True

    def __init__(
        self,
        student: PreTrainedModel,
        projectors: nn.ModuleDict,
        *,
        layer_map: Mapping[int, int],
        objective: Objective,
        forms: TargetForms = TargetForms(),
    ) -> None:
        super().__init__()
        _check_pairs(layer_map, projectors, objective)
        self.student = student
        self.projectors = projectors
        self.layer_map = dict(layer_map)
        self.objective = objective
        self.now = objective
        self.factors: Mapping[str, float] = {}
        self.scales = BlockScales()
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
        """Take the weights, times their factors, and the temperature of a step, counted from 0, of a run of so many."""
        self.now = self.objective.at(step, num_steps).times(self.factors)

    def check_targets(self) -> None:
        """Refuse an objective with a term whose target could not be read.

        Raises:
            TargetError: There is no form of it.
        """
        for term in self.objective.terms:
            for target in term.targets:
                if getattr(self.forms, target) is None:
                    raise _no_target(term, f"nothing gives {_TARGETS[target]}")

    @property
    def lacks_scales(self) -> bool:
        """Whether a term is measured by the scales of the teacher's blocks, and they are not measured yet."""
        return self.objective.needs_scales and not self.scales.states

    @torch.no_grad()
    def measure_scales(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Measure the scales of the teacher's mapped blocks over the first batches, some thousand positions.

        Args:
            batches: Arguments of `forward`; more than is needed is not asked for.

        Raises:
            DataError: At none of their positions anything counts.
        """
        seen, num_positions = [], 0
        for batch in batches:
            self._check_batch(batch)
            places_N = self._state_places(batch, counted_of(batch))
            seen.append((batch["hidden"], places_N))
            num_positions += len(places_N)
            if num_positions >= _SCALE_POSITIONS:
                break
        if not num_positions:
            raise DataError("nothing counts in the first train rows, on which the scale of the teacher is measured")
        self.scales = BlockScales.of((own, self._teacher_states(seen, of)) for own, of in self.layer_map.items())

    def state_pairs(self, batch: Mapping[str, Any]) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
        """Return, for each mapped pair, what `MappedStates.pairs` does, at the positions that count.

        Args:
            batch: Arguments of `forward`.
        """
        self._check_batch(batch)
        outputs, _, _ = self._run_student(batch)
        return self._mapped_states(outputs, batch, counted_of(batch), weights_of(batch)).pairs()

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
        weights: Tensor | None = None,
        logits: StoredLogits | None = None,
        hidden: StoredStates | None = None,
        counted: Tensor | None = None,
        counted_states: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            input_ids: Token ids [B, T].
            labels: As transformers has them, not shifted: the token ids [B, T], int64; `IGNORED` where a token does not
                count. None for all but padding.
            attention_mask: 1 at real positions [B, T]; None where nothing is padded.
            position_ids: Of each token [B, T]; the student's own where it is None.
            weights: What each token weighs as something to be predicted [B, T], float32, not shifted. None for 1
                wherever the label counts.
            logits: By role, the arrays of each column that the logits target reads, [B, T, ...].
            hidden: By teacher block as text, the arrays of its column.
            counted: Where the token that follows counts, as places in rows laid one behind the other, int64 [N]; found
                where it is None, for which a GPU is waited for.
            counted_states: Of these, the places at which block outputs are stored; for block outputs at some positions.
            num_items_in_batch: The sum of the weights of all positions that count in the whole accumulated batch; of
                this one where it is None.

        Returns:
            `loss`, which carries the gradient, and each term of the objective by its name, unweighted.

        Raises:
            TargetError: A term's target is not in the batch.
            DataError: Labels or weights are not one for each token id.
        """
        batch = {
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "weights": weights,
            "logits": logits,
            "hidden": hidden,
            "counted": counted,
            "counted_states": counted_states,
        }
        self._check_batch(batch)
        now = self.now
        counted_N, weights_BT = counted_of(batch), weights_of(batch)
        outputs, state_BTD, head = self._run_student(batch)
        num_positions = _num_positions(len(counted_N), weights_BT, num_items_in_batch)
        loss, values = vocabulary_loss(
            now.over_vocabulary,
            self._predictions(batch, counted_N, weights_BT),
            state_ND=at(state_BTD, counted_N),
            head=head,
            num_positions=num_positions,
        )
        if now.over_blocks:
            states = self._mapped_states(outputs, batch, counted_N, weights_BT)
            # A loss in half precision would be noise: whatever autocast does to the body ends here.
            with torch.autocast(device_type=input_ids.device.type, enabled=False):
                of_blocks = block_losses(now.over_blocks, states, self.projectors, num_positions=num_positions)
            for term in now.over_blocks:
                loss = loss + term.weight * of_blocks[term.name]
            values |= of_blocks
        return {"loss": loss, **values}

    def _run_student(self, batch: Mapping[str, Any]) -> tuple[dict[int, Tensor], Tensor, Head]:
        """Run the student once, for what all terms need of it."""
        blocks = list(self.layer_map) if self.objective.over_blocks else []
        return self._student(batch["input_ids"], batch.get("attention_mask"), blocks, batch.get("position_ids"))

    def _predictions(self, batch: Mapping[str, Any], counted_N: Tensor, weights_BT: Tensor | None) -> Predictions:
        target = None
        if self.objective.needs("logits"):
            assert self.forms.logits is not None
            with torch.no_grad():
                target = self.forms.logits.read(batch["logits"], counted_N, self.now.temperature)
        weights_N = None if weights_BT is None else at(weights_BT, counted_N)
        return Predictions(at(next_tokens(batch), counted_N), target, weights_N)

    def _mapped_states(
        self,
        outputs: Mapping[int, Tensor],
        batch: Mapping[str, Any],
        counted_N: Tensor,
        weights_BT: Tensor | None,
    ) -> MappedStates:
        assert self.forms.hidden is not None
        if self.lacks_scales:
            raise TargetError("the scale of the teacher's blocks is not known; call measure_scales with a few batches")
        stored, form = batch["hidden"], self.forms.hidden
        places_N = self._state_places(batch, counted_N)
        return MappedStates(self.layer_map, outputs, stored, form, places_N, weights_BT, self.scales)

    def _state_places(self, batch: Mapping[str, Any], counted_N: Tensor) -> Tensor:
        """Return at which of the places that count block outputs are stored: the same for every block."""
        form = self.forms.hidden
        assert form is not None
        if form.stored_share == 1.0:
            return counted_N
        given = batch.get(COUNTED_STATES)
        if given is not None:
            return given
        block = next(iter(self.layer_map.values()))
        return places_of(form.chosen(batch["hidden"], block, counts_of(batch)))

    def _teacher_states(self, seen: Sequence[tuple[StoredStates, Tensor]], block: int) -> Tensor:
        """Return a teacher block's output at some places of some batches, [N, Dt]."""
        form = self.forms.hidden
        assert form is not None
        return torch.cat([at(form.decode(stored, block), places_N) for stored, places_N in seen])

    def _check_batch(self, batch: Mapping[str, Any]) -> None:
        """Refuse a batch that lacks a term's target: none is ever left out without a word."""
        self.check_targets()
        for term in self.objective.terms:
            for target in term.targets:
                if lack := self._lack(target, batch.get(target) or {}):
                    raise _no_target(term, f"a batch has no {lack}")

    def _lack(self, target: TargetName, given: Mapping[str, Any]) -> str:
        """Name what of a target is not among what a batch gives of it; nothing where all of it is."""
        if target == "hidden":
            lacking = [str(block) for block in self.layer_map.values() if str(block) not in given]
            return f"output of teacher block {lacking[0]}" if lacking else ""
        if target == "logits":
            assert self.forms.logits is not None
            lacking = [repr(role) for role in self.forms.logits.roles if role not in given]
            return f"{' and no '.join(lacking)} of the teacher's logits" if lacking else ""
        assert_never(target)


def _num_positions(num_counted: int, weights_BT: Tensor | None, given: Tensor | float | None) -> Tensor | float:
    """Return what sums over positions are divided by, the sum of their weights; 1 where nothing counts."""
    number = given
    if number is None:
        number = num_counted if weights_BT is None else weights_BT.sum()
    return torch.where(number > 0, number, 1) if isinstance(number, Tensor) else number if number > 0 else 1


def _no_target(term: Term, lack: str) -> TargetError:
    return TargetError(
        f"{term.name} has the weight {term.weight_text}, but {lack}; give the trainer a teacher_model, or the rows of "
        f"a store that has it, or set {term.weight_key} to 0"
    )


def _check_pairs(layer_map: Mapping[int, int], projectors: nn.ModuleDict, objective: Objective) -> None:
    for term in objective.terms:
        if len(layer_map) < term.fewest_pairs:
            raise RecipeError(
                f"{term.weight_text} needs a layer_map of at least {term.fewest_pairs} pairs of student and teacher "
                f"block, got {len(layer_map)}; map more, or set {term.weight_key} to 0"
            )
    lacking = [block for block in layer_map if str(block) not in projectors]
    if lacking:
        raise RecipeError(
            f"layer_map maps student block {lacking[0]}, but there is no projector for it; projectors has: "
            f"{', '.join(projectors) or 'none'}"
        )
