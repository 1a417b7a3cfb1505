"""`loss_hidden`: how far the output of each mapped block is from that of its teacher block, a mean over pairs."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from coldstill.pipeline.losses.state_losses import (
    HIDDEN_LOSSES,
    HIDDEN_UNITS,
    POSITION_WEIGHTS,
    SCALED_LOSSES,
    StateScale,
)
from coldstill.pipeline.losses.term import BlockTerm, StatePair, weighted_sum
from coldstill.pipeline.recipe.loss import HiddenLoss, LossConfig, TermName


@dataclass(frozen=True)
class Hidden(BlockTerm):
    """The loss of mapped block outputs.

    Attributes:
        loss_name: Which loss of two states, a name of `HIDDEN_LOSSES`.
    """

    name: ClassVar[TermName] = "loss_hidden"
    title: ClassVar[str] = "Hidden loss"
    label: ClassVar[str] = "hidden"
    compared: ClassVar[str] = "block outputs"

    loss_name: HiddenLoss

    @classmethod
    def options(cls, section: LossConfig, /) -> dict[str, Any]:
        """Return the recipe's loss of block outputs."""
        return {"loss_name": section.hidden}

    @property
    def summary(self) -> str:
        """What it compares."""
        return f"hidden ({self.loss_name})"

    @property
    def unit(self) -> str:
        """What it is measured in."""
        return HIDDEN_UNITS[self.loss_name]

    @property
    def needs_scale(self) -> bool:
        """Whether it is measured by the scales of the teacher's blocks."""
        return self.loss_name in SCALED_LOSSES

    def loss(self, pair: StatePair, _before: StatePair | None, /) -> Tensor:
        """Return the sum over positions at one mapped pair."""
        loss_N = HIDDEN_LOSSES[self.loss_name](pair.student_ND, pair.teacher_ND, pair.scale)
        return weighted_sum(loss_N, pair.weights_N)

    def position_weights(self, teacher_ND: Tensor, scale: StateScale | None) -> Tensor:
        """Say what the squared error of each position weighs in it, about, [N]."""
        return POSITION_WEIGHTS[self.loss_name](teacher_ND, scale)
