"""One module of student, projectors and losses, so that whatever wraps a model (DDP, FSDP, autocast) wraps all of it.

Shapes: B rows, T positions, N positions that count, K stored tokens, V vocabulary, Ds and Dt widths.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.encodings import decode_hidden, decode_topk
from pipeline.forward import block_outputs
from pipeline.losses import HIDDEN_LOSSES, bucketed_kl, cross_entropy
from pipeline.models import take_apart

IGNORED = -100


@dataclass(frozen=True)
class LossWeights:
    """The loss: alpha * task + beta * logits + gamma * hidden.

    Attributes:
        alpha: Weight of the cross entropy.
        beta: Weight of the divergence times temperature squared.
        gamma: Weight of the hidden loss.
        temperature: Of the divergence.
        hidden: A name of `pipeline.losses.HIDDEN_LOSSES`.
        k: How many stored tokens the divergence reads.
    """

    alpha: float
    beta: float
    gamma: float
    temperature: float
    hidden: str
    k: int


class Distiller(nn.Module):
    """Student and projectors in, loss and its terms out.

    Args:
        student: Any causal language model.
        projectors: One for each mapped student block, by its index as text.
        layer_map: Student block to teacher block; empty where gamma is 0.
        weights: The loss.
    """

    # Tells the Trainer that `forward` divides by the number of positions of the whole accumulated batch.
    accepts_loss_kwargs = True

    def __init__(
        self, student: PreTrainedModel, projectors: nn.ModuleDict, *, layer_map: Mapping[int, int], weights: LossWeights
    ) -> None:
        super().__init__()
        self.student = student
        self.projectors = projectors
        self.layer_map = dict(layer_map)
        self.weights = weights
        self._blocks_name = take_apart(student).blocks_name

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
        topk: Mapping[str, Tensor] | None = None,
        logsumexp: Tensor | None = None,
        hidden: Mapping[str, Mapping[str, Tensor]] | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            input_ids: Token ids [B, T].
            labels: The token that follows each position [B, T], int64; `IGNORED` where it does not count.
            attention_mask: 1 at real positions [B, T]; None where nothing is padded.
            topk: The arrays of the column of largest logits, [B, T, ...].
            logsumexp: The teacher's normaliser at the loss's temperature [B, T].
            hidden: By teacher block as text, the arrays of its column.
            num_items_in_batch: Positions that count in the whole accumulated batch; of this one where it is None.

        Returns:
            `loss`, and each term of weight above 0 as `loss_task`, `loss_logits` and `loss_hidden`, unweighted.
        """
        blocks = self.student.get_submodule(self._blocks_name)
        with block_outputs(blocks, list(self.layer_map)) as outputs:
            logits_BTV = self.student(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        counts_BT = labels != IGNORED
        num_positions = counts_BT.sum() if num_items_in_batch is None else num_items_in_batch
        terms: dict[str, Tensor] = {}
        # A loss in half precision would be noise: whatever autocast does to the body ends here.
        with torch.autocast(device_type=input_ids.device.type, enabled=False):
            logits_NV = logits_BTV[counts_BT]
            if self.weights.alpha:
                terms["loss_task"] = cross_entropy(logits_NV, labels[counts_BT], num_positions=num_positions)
            if self.weights.beta and topk is not None and logsumexp is not None:
                stored = {name: values[counts_BT] for name, values in topk.items()}
                terms["loss_logits"] = self._logits_loss(logits_NV, stored, logsumexp[counts_BT], num_positions)
            if self.weights.gamma and hidden is not None:
                terms["loss_hidden"] = self._hidden_loss(outputs, hidden, counts_BT, num_positions)
        return {"loss": self._weighted(terms), **terms}

    def _logits_loss(
        self, logits_NV: Tensor, stored: Mapping[str, Tensor], logsumexp_N: Tensor, num_positions: Tensor | int
    ) -> Tensor:
        top_logits_NK, top_ids_NK = decode_topk(stored, k=self.weights.k)
        return bucketed_kl(
            logits_NV,
            top_logits_NK,
            top_ids_NK,
            logsumexp_N,
            temperature=self.weights.temperature,
            num_positions=num_positions,
        )

    def _hidden_loss(
        self,
        outputs: Mapping[int, Tensor],
        hidden: Mapping[str, Mapping[str, Tensor]],
        counts_BT: Tensor,
        num_positions: Tensor | int,
    ) -> Tensor:
        """Take the mean over mapped pairs."""
        loss_of = HIDDEN_LOSSES[self.weights.hidden]
        losses = []
        for student_block, teacher_block in self.layer_map.items():
            teacher_ND = decode_hidden(hidden[str(teacher_block)])[counts_BT]
            projector = self.projectors[str(student_block)]
            # The student's state may be bfloat16 under autocast; the projector's weights are float32.
            student_ND = projector(outputs[student_block][counts_BT].float())
            losses.append(loss_of(student_ND, teacher_ND, num_positions=num_positions))
        return torch.stack(losses).mean()

    def _weighted(self, terms: Mapping[str, Tensor]) -> Tensor:
        weight_of = {
            "loss_task": self.weights.alpha,
            "loss_logits": self.weights.beta,
            "loss_hidden": self.weights.gamma,
        }
        return torch.stack([weight_of[name] * term for name, term in terms.items()]).sum()
