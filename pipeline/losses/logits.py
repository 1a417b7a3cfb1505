"""`loss_logits`: how far the student's distribution is from the teacher's, a divergence times temperature squared."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from coldstill.pipeline.losses.divergences import Divergence
from coldstill.pipeline.losses.logits_targets import LogitsTarget
from coldstill.pipeline.losses.student_logits import Request, StudentEvents
from coldstill.pipeline.losses.term import Predictions, VocabularyTerm
from coldstill.pipeline.recipe.loss import LossConfig, TermName


@dataclass(frozen=True)
class Logits(VocabularyTerm):
    """The divergence, at the temperature of the target.

    Attributes:
        divergence: Of the student's distribution from the teacher's.
    """

    name: ClassVar[TermName] = "loss_logits"
    title: ClassVar[str] = "Logits loss"
    label: ClassVar[str] = "logits (T² · div.)"

    divergence: Divergence

    @classmethod
    def options(cls, section: LossConfig, /) -> dict[str, Any]:
        """Return the recipe's divergence."""
        return {"divergence": Divergence.of(section)}

    @property
    def summary(self) -> str:
        """What it compares."""
        return self.divergence.summary

    @property
    def unit(self) -> str:
        """What it is measured in."""
        return "T² · divergence (nats a token)"

    def request(self, predictions: Predictions, chunk: slice) -> Request | None:
        """Ask for what the target compares."""
        return _target(predictions).request(chunk, of_forward_kl=self.divergence.name == "forward_kl")

    def loss(self, predictions: Predictions, chunk: slice, student: StudentEvents) -> Tensor:
        """Return the sum over a chunk of positions."""
        if student.kl_C is not None:
            return predictions.total(chunk, student.kl_C)
        return predictions.total(chunk, self.divergence(_target(predictions).events(chunk, student)))

    def scale(self, predictions: Predictions, /) -> float:
        """Return temperature squared: the gradient of logits / T is 1 / T^2 of what it is at temperature 1."""
        return _target(predictions).temperature ** 2


def _target(predictions: Predictions) -> LogitsTarget:
    assert predictions.target is not None
    return predictions.target
