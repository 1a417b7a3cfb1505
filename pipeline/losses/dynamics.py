"""`loss_dynamics`: how far the change from each mapped block to the next is from the teacher's, a mean over changes.

After feature dynamics distillation (Gong et al., ACL 2025), which compares the changes of vocabulary projections; here
they are those of the states themselves, at the teacher's width.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from coldstill.pipeline.losses.state_losses import HIDDEN_LOSSES, HIDDEN_UNITS, SCALED_LOSSES
from coldstill.pipeline.losses.term import BlockTerm, StatePair, weighted_sum
from coldstill.pipeline.recipe.loss import HiddenLoss, LossConfig, TermName


@dataclass(frozen=True)
class Dynamics(BlockTerm):
    """The loss of changes between mapped blocks.

    Attributes:
        loss_name: Which loss of two changes, a name of `HIDDEN_LOSSES`.
    """

    name: ClassVar[TermName] = "loss_dynamics"
    title: ClassVar[str] = "Loss of dynamics"
    label: ClassVar[str] = "dynamics"
    compared: ClassVar[str] = "changes from each mapped block to the next"
    fewest_pairs: ClassVar[int] = 2

    loss_name: HiddenLoss

    @classmethod
    def options(cls, section: LossConfig, /) -> dict[str, Any]:
        """Return the recipe's loss of changes."""
        return {"loss_name": section.dynamics}

    @property
    def summary(self) -> str:
        """What it compares."""
        return f"dynamics ({self.loss_name})"

    @property
    def unit(self) -> str:
        """What it is measured in."""
        return HIDDEN_UNITS[self.loss_name]

    @property
    def needs_scale(self) -> bool:
        """Whether it is measured by the scales of the teacher's blocks."""
        return self.loss_name in SCALED_LOSSES

    def loss(self, pair: StatePair, before: StatePair | None, /) -> Tensor | None:
        """Return the sum over positions of the change since the pair before; None at the first pair."""
        if before is None:
            return None
        changes = pair.student_ND - before.student_ND, pair.teacher_ND - before.teacher_ND
        return weighted_sum(HIDDEN_LOSSES[self.loss_name](*changes, pair.scale_of_change), pair.weights_N)
