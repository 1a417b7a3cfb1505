"""The terms over block outputs: how far each mapped block's output is, and how far its change since the last one.

Shapes: B rows, T positions, N positions that count, Ds and Dt widths of student and teacher.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from coldstill.pipeline.losses.terms import HIDDEN_LOSSES
from torch import Tensor, nn

StoredStates = Mapping[str, Mapping[str, Tensor]]


class HiddenForm(Protocol):
    """How a batch's block outputs are read; see `coldstill.pipeline.targets.forms`."""

    @property
    def stored_share(self) -> float:
        """The share of positions that are stored."""

    def decode(self, stored: StoredStates, block: int) -> Tensor:
        """Return a teacher block's output, [B, T, Dt] in float32."""

    def chosen(self, stored: StoredStates, block: int, counts_BT: Tensor) -> Tensor:
        """Return which of the positions that count are stored, [B, T]."""


@dataclass(frozen=True)
class HiddenTerms:
    """Which terms there are over the mapped blocks.

    Attributes:
        layer_map: Student block to teacher block, in the student's order.
        form: How the teacher's block outputs are stored.
        hidden: The loss of each mapped block's output, a name of `HIDDEN_LOSSES`; None for no such term.
        dynamics: The loss of the change from each mapped block to the next one; None for no such term. After feature
            dynamics distillation (Gong et al., ACL 2025), which compares the changes of vocabulary projections; here
            they are those of the states themselves, at the teacher's width.
    """

    layer_map: Mapping[int, int]
    form: HiddenForm
    hidden: str | None
    dynamics: str | None

    def __call__(
        self,
        outputs: Mapping[int, Tensor],
        stored: StoredStates,
        projectors: nn.ModuleDict,
        counts_BT: Tensor,
        num_positions: Tensor | float,
    ) -> dict[str, Tensor]:
        """Give each term: a mean over pairs; of positions stored at random, the sum is divided by their share.

        Args:
            outputs: The student's output [B, T, Ds] of each mapped block.
            stored: The teacher's, by block as text, as they are stored.
            projectors: By student block as text.
            counts_BT: Which positions count.
            num_positions: What a sum over positions is divided by.
        """
        divisor = num_positions * self.form.stored_share
        losses: dict[str, list[Tensor]] = {"loss_hidden": [], "loss_dynamics": []}
        last: tuple[Tensor, Tensor] | None = None
        for name, own_ND, teacher_ND in self.pairs(outputs, stored, counts_BT):
            student_ND = projectors[name](own_ND)
            if self.hidden is not None:
                loss = HIDDEN_LOSSES[self.hidden](student_ND, teacher_ND, num_positions=divisor)
                losses["loss_hidden"].append(loss)
            if self.dynamics is not None and last is not None:
                changes = student_ND - last[0], teacher_ND - last[1]
                losses["loss_dynamics"].append(HIDDEN_LOSSES[self.dynamics](*changes, num_positions=divisor))
            last = student_ND, teacher_ND
        return {name: torch.stack(values).mean() for name, values in losses.items() if values}

    def pairs(
        self, outputs: Mapping[int, Tensor], stored: StoredStates, counts_BT: Tensor
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Give, pair by pair, the student block as text, its states [N, Ds] and the teacher's [N, Dt], in float32."""
        for student_block, teacher_block in self.layer_map.items():
            chosen_BT = self.form.chosen(stored, teacher_block, counts_BT)
            with torch.no_grad():
                teacher_ND = self.form.decode(stored, teacher_block)[chosen_BT]
            # The student's state may be bfloat16 under autocast; the projector's weights are float32.
            yield str(student_block), outputs[student_block][chosen_BT].float(), teacher_ND
