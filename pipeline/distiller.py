"""One module of student, projectors and losses, so that whatever wraps a model wraps all that is trained.

Knows tensors only: no store, no recipe. Targets come in as they are stored and are decoded here, on the device.
Shapes: B rows, T positions, N positions that count, C positions of a chunk, D width, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.chunked_loss import chunked_loss
from pipeline.divergences import Divergence
from pipeline.encodings import STORED, StateForm, decode_state
from pipeline.forward import block_outputs
from pipeline.logits_targets import LogitsForm, LogitsTarget, StoredLogits
from pipeline.losses import HIDDEN_LOSSES, cross_entropy
from pipeline.models import take_apart, text_config
from pipeline.output_head import OutputHead
from pipeline.transform_coding import TransformCode

IGNORED = -100


@dataclass(frozen=True)
class LossWeights:
    """The loss: alpha * task + beta * logits + gamma * hidden.

    Attributes:
        alpha: Weight of the cross entropy.
        beta: Weight of the divergence times temperature squared.
        gamma: Weight of the hidden loss.
        temperature: Of the divergence.
        divergence: Of the student's distribution from the teacher's.
        hidden: A name of `pipeline.losses.HIDDEN_LOSSES`.
    """

    alpha: float
    beta: float
    gamma: float
    temperature: float
    divergence: Divergence
    hidden: str


@dataclass(frozen=True)
class TargetForms:
    """How the stored targets of a batch are read.

    Attributes:
        logits: The kind of logits target; None where there is none.
        hidden: How block outputs are stored; None where there are none.
        hidden_codes: The transform code of each teacher block, where they are coded.
    """

    logits: LogitsForm | None = None
    hidden: StateForm | None = None
    hidden_codes: Mapping[int, TransformCode] = field(default_factory=dict)


class Distiller(nn.Module):
    """Student and projectors in, loss and its terms out.

    Args:
        student: Any causal language model.
        projectors: One for each mapped student block, by its index as text.
        layer_map: Student block to teacher block; empty where gamma is 0.
        weights: The loss.
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
        weights: LossWeights,
        forms: TargetForms,
    ) -> None:
        super().__init__()
        self.student = student
        self.projectors = projectors
        self.layer_map = dict(layer_map)
        self.weights = weights
        self.forms = forms
        self._codes = dict(forms.hidden_codes)
        parts = take_apart(student)
        self._blocks_name, self._body_name = parts.blocks_name, parts.body_name

    @property
    def config(self) -> Any:
        """The student's config, which the Trainer and its integrations read."""
        return self.student.config

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Trade compute for memory in the student's blocks; what the hidden loss reads stays in the graph."""
        self.student.activation_checkpointing_enable(**kwargs)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        logits: StoredLogits | None = None,
        hidden: Mapping[str, Mapping[str, Tensor]] | None = None,
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
            `loss`, which carries the gradient, and each term of weight above 0 as `loss_task`, `loss_logits` and
            `loss_hidden`, unweighted.
        """
        blocks, body = self.student.get_submodule(self._blocks_name), self.student.get_submodule(self._body_name)
        with block_outputs(blocks, list(self.layer_map)) as outputs:
            output = body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        counts_BT = labels != IGNORED
        num_positions = counts_BT.sum() if num_items_in_batch is None else num_items_in_batch
        target = None
        if self.weights.beta and logits is not None and self.forms.logits is not None:
            with torch.no_grad():
                target = self.forms.logits.read(logits, counts_BT)
        state_ND = output.last_hidden_state[counts_BT]
        loss, terms = self._vocabulary_loss(state_ND, labels[counts_BT], target, num_positions)
        if self.weights.gamma and hidden is not None:
            # A loss in half precision would be noise: whatever autocast does to the body ends here.
            with torch.autocast(device_type=input_ids.device.type, enabled=False):
                terms["loss_hidden"] = self._hidden_loss(outputs, hidden, counts_BT, num_positions)
            loss = loss + self.weights.gamma * terms["loss_hidden"]
        return {"loss": loss, **terms}

    def _vocabulary_loss(
        self, state_ND: Tensor, next_tokens_N: Tensor, target: LogitsTarget | None, num_positions: Tensor | int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Give the weighted sum of the terms over the vocabulary, with its gradient, and each term."""
        weight_of = {"loss_task": self.weights.alpha, "loss_logits": self.weights.beta if target else 0.0}
        weight_of = {name: weight for name, weight in weight_of.items() if weight}
        if not weight_of:
            return state_ND.new_zeros((), dtype=torch.float32), {}

        def terms_of_chunk(logits_CV: Tensor, chunk: slice) -> Tensor:
            # The head ran as autocast wants it; the losses do not.
            with torch.autocast(device_type=logits_CV.device.type, enabled=False):
                terms = []
                if "loss_task" in weight_of:
                    terms.append(cross_entropy(logits_CV, next_tokens_N[chunk], num_positions=num_positions))
                if target is not None:
                    divergence_C = self.weights.divergence(target.events(chunk, logits_CV))
                    terms.append(divergence_C.sum() * self.weights.temperature**2 / num_positions)
                return torch.stack(terms)

        head = OutputHead.of_model(self.student.get_output_embeddings(), text_config(self.student.config))
        weights = torch.tensor(list(weight_of.values()), device=state_ND.device)
        loss, terms = chunked_loss(state_ND, head, terms_of_chunk, weights)
        return loss, dict(zip(weight_of, terms.unbind(), strict=True))

    def _hidden_loss(
        self,
        outputs: Mapping[int, Tensor],
        hidden: Mapping[str, Mapping[str, Tensor]],
        counts_BT: Tensor,
        num_positions: Tensor | int,
    ) -> Tensor:
        """Take the mean over mapped pairs; of positions stored at random, the sum is divided by their share."""
        form = self.forms.hidden
        assert form is not None
        loss_of = HIDDEN_LOSSES[self.weights.hidden]
        losses = []
        for student_block, teacher_block in self.layer_map.items():
            arrays = hidden[str(teacher_block)]
            chosen_BT = counts_BT & arrays[STORED].bool() if STORED in arrays else counts_BT
            code = self._code(teacher_block, counts_BT.device)
            teacher_ND = decode_state(arrays, form=form, code=code)[chosen_BT]
            projector = self.projectors[str(student_block)]
            # The student's state may be bfloat16 under autocast; the projector's weights are float32.
            student_ND = projector(outputs[student_block][chosen_BT].float())
            losses.append(loss_of(student_ND, teacher_ND, num_positions=num_positions * form.fraction))
        return torch.stack(losses).mean()

    def _code(self, teacher_block: int, device: torch.device) -> TransformCode | None:
        """Give a block's transform code on a device, which it is brought to once."""
        code = self._codes.get(teacher_block)
        if code is not None and code.centre_D.device != device:
            code = self._codes[teacher_block] = code.to(device)
        return code
