"""The loss of a run: a sum of terms, each times its weight, and the temperature; both may change over the run."""

from dataclasses import dataclass, replace

from coldstill.pipeline.losses.dynamics import Dynamics
from coldstill.pipeline.losses.hidden import Hidden
from coldstill.pipeline.losses.logits import Logits
from coldstill.pipeline.losses.schedules import Schedule
from coldstill.pipeline.losses.task import Task
from coldstill.pipeline.losses.term import BlockTerm, Term, VocabularyTerm
from coldstill.pipeline.recipe.loss import LossConfig, TargetName

# Every kind of term, in the order in which they are added up.
TERMS: tuple[type[Term], ...] = (Task, Logits, Hidden, Dynamics)


@dataclass(frozen=True)
class Objective:
    """The loss.

    Attributes:
        terms: Each with its weight; all of them are computed, those too whose weight is 0 at this step.
        temperature: Of the teacher's and the student's distribution, at the first step.
        temperature_schedule: How the temperature changes over the run; None where it does not.
    """

    terms: tuple[Term, ...]
    temperature: float = 1.0
    temperature_schedule: Schedule | None = None

    @classmethod
    def of(cls, section: LossConfig) -> "Objective":
        """Make the objective of a recipe's loss section: of the terms that have a weight at any step."""
        terms = tuple(term.of(section) for term in TERMS if term.name in section.terms)
        return cls(terms, section.temperature, Schedule.of(section, "temperature"))

    @property
    def over_vocabulary(self) -> list[VocabularyTerm]:
        """The terms over the student's logits."""
        return [term for term in self.terms if isinstance(term, VocabularyTerm)]

    @property
    def over_blocks(self) -> list[BlockTerm]:
        """The terms over the outputs of mapped blocks."""
        return [term for term in self.terms if isinstance(term, BlockTerm)]

    def needs(self, target: TargetName) -> bool:
        """Whether any of the terms needs a target of the teacher."""
        return any(target in term.targets for term in self.terms)

    def at(self, step: int, num_steps: int) -> "Objective":
        """Return the objective with its values at a step, counted from 0, of a run of so many."""
        schedule = self.temperature_schedule
        return replace(
            self,
            terms=tuple(term.at(step, num_steps) for term in self.terms),
            temperature=self.temperature if schedule is None else schedule.at(step, num_steps),
        )

    def scheduled_values(self) -> dict[str, float]:
        """Return the weights and the temperature that have a schedule, as the recipe calls them."""
        values: dict[str, float] = {term.weight_key: term.weight for term in self.terms if term.schedule is not None}
        return values if self.temperature_schedule is None else {**values, "temperature": self.temperature}
