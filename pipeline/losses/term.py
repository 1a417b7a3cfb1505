"""A term of the loss: what it is called, what it weighs, what it needs, and how far the student is off by it.

Terms over the vocabulary share one pass over the student's logits (`vocabulary_losses`), those over block outputs one
pass over the mapped blocks (`block_losses`): a pass asks each of its terms. To add a term, write its class in a file
beside this one, name it in `coldstill.pipeline.losses.objective.TERMS`, and give it its keys in
`coldstill.pipeline.recipe.loss`.
Shapes: N positions that count, C positions of a chunk, V vocabulary, D width.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from coldstill.pipeline.losses.logits_targets import LogitsTarget
from coldstill.pipeline.losses.schedules import Schedule
from coldstill.pipeline.losses.state_losses import StateScale
from coldstill.pipeline.losses.student_logits import Request, StudentEvents
from coldstill.pipeline.recipe.loss import TERM_KEYS, LossConfig, LossWeight, TargetName, TermName


@dataclass(frozen=True)
class Term(ABC):
    """One term of the loss, before its weight.

    Attributes:
        name: What the log calls it.
        title: What a figure of it is called.
        label: What it is called beside others in one figure.
        fewest_pairs: How many pairs of student and teacher block it needs.
        weight: What it is multiplied by, at the first step.
        schedule: How the weight changes over the run; None where it does not.
    """

    name: ClassVar[TermName]
    title: ClassVar[str]
    label: ClassVar[str]
    fewest_pairs: ClassVar[int] = 0

    weight: float
    schedule: Schedule | None = field(default=None, kw_only=True)

    @classmethod
    def of(cls, section: LossConfig) -> Self:
        """Make the term of a recipe's loss section."""
        key = TERM_KEYS[cls.name].weight
        return cls(getattr(section, key), schedule=Schedule.of(section, key), **cls.options(section))

    @classmethod
    def options(cls, _section: LossConfig, /) -> dict[str, Any]:
        """Return what a recipe's loss section says of it beside its weight, as its attributes."""
        return {}

    @property
    def weight_key(self) -> LossWeight:
        """What a recipe calls the weight."""
        return TERM_KEYS[self.name].weight

    @property
    def targets(self) -> tuple[TargetName, ...]:
        """What it needs of the teacher: `logits`, the distribution over the vocabulary; `hidden`, mapped blocks."""
        return TERM_KEYS[self.name].targets

    @property
    def weight_text(self) -> str:
        """The weight as an error names it."""
        later = "" if self.schedule is None else f", and {self.schedule.end:g} at the last step"
        return f"{self.weight_key} = {self.weight:g}{later}"

    @property
    @abstractmethod
    def summary(self) -> str:
        """What it compares, in a few words, for a model's card."""

    @property
    @abstractmethod
    def unit(self) -> str:
        """What it is measured in, for a figure's axis."""

    def at(self, step: int, num_steps: int) -> Self:
        """Return the term with its weight at a step, counted from 0, of a run of so many."""
        return self if self.schedule is None else replace(self, weight=self.schedule.at(step, num_steps))


@dataclass(frozen=True)
class Predictions:
    """What is known of the N positions of a batch at which the next token counts.

    Attributes:
        next_tokens_N: The token that follows each, int64.
        target: The teacher's distribution there; None where no term needs it.
        weights_N: What each position weighs, float32; None where each weighs 1.
    """

    next_tokens_N: Tensor
    target: LogitsTarget | None = None
    weights_N: Tensor | None = None

    def total(self, chunk: slice, values_C: Tensor) -> Tensor:
        """Return the sum of some positions' values, each times its weight."""
        return weighted_sum(values_C, None if self.weights_N is None else self.weights_N[chunk])


class VocabularyTerm(Term):
    """A term over the student's logits; needs the student's last state and its output head."""

    @abstractmethod
    def request(self, predictions: Predictions, chunk: slice) -> Request | None:
        """Say what it needs of the student's logits at a chunk of positions; None for all of them."""

    @abstractmethod
    def loss(self, predictions: Predictions, chunk: slice, student: StudentEvents) -> Tensor:
        """Return the sum over a chunk of positions, with the student's gradient.

        Args:
            predictions: Of the whole batch.
            chunk: Which of its positions.
            student: What was requested; every logit, undivided and in the dtype of the head's product, where any of
                the terms requests them all.
        """

    def scale(self, _predictions: Predictions, /) -> float:
        """Return what the sum is multiplied by, beside its weight."""
        return 1.0


@dataclass(frozen=True)
class StatePair:
    """A mapped block on both sides, at the positions that count and are stored.

    Attributes:
        student_ND: The student's output, projected to the teacher's width, float32 and with its gradient.
        teacher_ND: The teacher's, float32.
        weights_N: What each position weighs, float32; None where each weighs 1.
        scale: What the teacher's output does at the block; None where no term is measured by it.
        scale_of_change: The same of its change since the pair before.
    """

    student_ND: Tensor
    teacher_ND: Tensor
    weights_N: Tensor | None = None
    scale: StateScale | None = None
    scale_of_change: StateScale | None = None


class BlockTerm(Term):
    """A term over the outputs of mapped blocks; needs those of student and teacher.

    Attributes:
        compared: What of student and teacher it compares.
    """

    fewest_pairs: ClassVar[int] = 1
    compared: ClassVar[str]

    @property
    @abstractmethod
    def needs_scale(self) -> bool:
        """Whether it is measured by the scales of the teacher's blocks."""

    @abstractmethod
    def loss(self, pair: StatePair, before: StatePair | None, /) -> Tensor | None:
        """Return the sum over positions at one mapped pair, with the student's gradient.

        Args:
            pair: The pair.
            before: The one before it in the student's order; None at the first.

        Returns:
            None where there is nothing to compare.
        """


def weighted_sum(values_N: Tensor, weights_N: Tensor | None) -> Tensor:
    """Return the sum of positions' values, each times its weight."""
    return (values_N if weights_N is None else values_N * weights_N).sum()
