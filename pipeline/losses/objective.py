"""The loss of a run: a sum of terms, each times its weight, and the temperature; both may change over the run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from coldstill.pipeline.losses.dynamics import Dynamics
from coldstill.pipeline.losses.hidden import Hidden
from coldstill.pipeline.losses.logits import Logits
from coldstill.pipeline.losses.schedules import Schedule
from coldstill.pipeline.losses.task import Task
from coldstill.pipeline.losses.term import BlockTerm, Term, VocabularyTerm
from coldstill.pipeline.recipe.loss import Balance, LossConfig, TargetName

# Every kind of term, in the order in which they are added up.
TERMS: tuple[type[Term], ...] = (Task, Logits, Hidden, Dynamics)


@dataclass(frozen=True)
class Objective:
    """The loss.

    Attributes:
        terms: Each with its weight; all of them are computed, those too whose weight is 0 at this step.
        temperature: Of the teacher's and the student's distribution, at the first step.
        temperature_schedule: How the temperature changes over the run; None where it does not.
        balance: What keeps the terms in the proportion of their weights.
    """

    terms: tuple[Term, ...]
    temperature: float = 1.0
    temperature_schedule: Schedule | None = None
    balance: Balance = "none"

    @classmethod
    def of(cls, section: LossConfig) -> "Objective":
        """Make the objective of a recipe's loss section: of the terms that have a weight at any step."""
        terms = tuple(term.of(section) for term in TERMS if term.name in section.terms)
        return cls(terms, section.temperature, Schedule.of(section, "temperature"), section.balance)

    @property
    def over_vocabulary(self) -> list[VocabularyTerm]:
        """The terms over the student's logits."""
        return [term for term in self.terms if isinstance(term, VocabularyTerm)]

    @property
    def over_blocks(self) -> list[BlockTerm]:
        """The terms over the outputs of mapped blocks."""
        return [term for term in self.terms if isinstance(term, BlockTerm)]

    @property
    def needs_scales(self) -> bool:
        """Whether any of the terms is measured by the scales of the teacher's blocks."""
        return any(term.needs_scale for term in self.over_blocks)

    def needs(self, target: TargetName) -> bool:
        """Whether any of the terms needs a target of the teacher."""
        return any(target in term.targets for term in self.terms)

    @property
    def is_balanced(self) -> bool:
        """Whether weights are multiplied by factors that are measured."""
        return self.balance == "gradient" and len(self.terms) > 1

    @property
    def anchor(self) -> Term:
        """The term whose weight no factor changes: of those over the vocabulary, where there are any, the heaviest."""

        def heaviest(term: Term) -> float:
            return max(term.weight, 0.0 if term.schedule is None else term.schedule.end)

        return max(self.over_vocabulary or self.terms, key=heaviest)

    def at(self, step: int, num_steps: int) -> "Objective":
        """Return the objective with its values at a step, counted from 0, of a run of so many."""
        schedule = self.temperature_schedule
        return replace(
            self,
            terms=tuple(term.at(step, num_steps) for term in self.terms),
            temperature=self.temperature if schedule is None else schedule.at(step, num_steps),
        )

    def times(self, factors: Mapping[str, float]) -> "Objective":
        """Return the objective with the weights of some terms, by name, multiplied."""
        terms = (replace(term, weight=term.weight * factors.get(term.name, 1.0)) for term in self.terms)
        return replace(self, terms=tuple(terms))

    def moving_values(self) -> dict[str, float]:
        """Return the weights and the temperature that change over the run, as the recipe calls them."""
        moving = (term for term in self.terms if term.schedule is not None or self.is_balanced)
        values: dict[str, float] = {term.weight_key: term.weight for term in moving}
        return values if self.temperature_schedule is None else {**values, "temperature": self.temperature}
