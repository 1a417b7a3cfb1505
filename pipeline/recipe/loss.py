"""The loss section of a recipe: weights, divergence, kinds of the hidden terms, and what changes over the run.

The names that a recipe may use stand here, and nowhere else; what they do is in `coldstill.pipeline.losses`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from pydantic import model_validator

from coldstill.pipeline.recipe.fields import Count, Fraction, Positive, Section, WarmupFraction, Weight, later

DivergenceName = Literal[
    "forward_kl", "reverse_kl", "jensen_shannon", "skewed_kl", "bidirectional", "selective", "total_variation"
]
# The weight of each divergence that has one, where the recipe gives none.
DIVERGENCE_WEIGHTS: Mapping[DivergenceName, float] = {"jensen_shannon": 0.5, "skewed_kl": 0.1, "bidirectional": 0.5}
HiddenLoss = Literal["mse", "normalised_mse", "standardised_mse", "cosine"]
Balance = Literal["none", "gradient"]
LossWeight = Literal["alpha", "beta", "gamma", "delta"]
TermName = Literal["loss_task", "loss_logits", "loss_hidden", "loss_dynamics"]
# What the log calls each term's share of the gradient.
SHARES: Mapping[str, str] = {name: name.replace("loss", "share") for name in get_args(TermName)}
# Sections of `targets`.
TargetName = Literal["logits", "hidden"]
WeightShape = Literal["constant", "linear", "cosine"]
ScheduleShape = Literal[WeightShape, "exponential"]


@dataclass(frozen=True)
class TermKeys:
    """What in a recipe belongs to a term of the loss.

    Attributes:
        weight: The key of its weight.
        targets: The sections of `targets` that say what it learns from.
        options: The keys that have no effect without it.
    """

    weight: LossWeight
    targets: tuple[TargetName, ...] = ()
    options: tuple[str, ...] = ()


# By the names of the terms in the log.
TERM_KEYS: Mapping[TermName, TermKeys] = {
    "loss_task": TermKeys("alpha"),
    "loss_logits": TermKeys(
        "beta", ("logits",), ("temperature", "divergence", "divergence_weight", "selective_k", "selective_entropy")
    ),
    "loss_hidden": TermKeys("gamma", ("hidden",), ("hidden",)),
    "loss_dynamics": TermKeys("delta", ("hidden",), ("dynamics",)),
}


class WeightScheduleConfig(Section):
    """How a weight of the loss changes over the run, from the value that the recipe gives it."""

    shape: WeightShape = "linear"
    end: Weight | None = None
    warmup: WarmupFraction = 0.0

    @model_validator(mode="after")
    def _check(self) -> "WeightScheduleConfig":
        return _with_end(self)


class TemperatureScheduleConfig(Section):
    """How the temperature changes over the run, from the one that the recipe gives."""

    shape: ScheduleShape = "linear"
    end: Positive | None = None
    warmup: WarmupFraction = 0.0

    @model_validator(mode="after")
    def _check(self) -> "TemperatureScheduleConfig":
        return _with_end(self)


class SchedulesConfig(Section):
    """What of the loss changes over the run."""

    alpha: WeightScheduleConfig | None = None
    beta: WeightScheduleConfig | None = None
    gamma: WeightScheduleConfig | None = None
    delta: WeightScheduleConfig | None = None
    temperature: TemperatureScheduleConfig | None = None


class LossConfig(Section):
    """alpha * cross entropy + beta * divergence * temperature^2 + gamma * hidden + delta * dynamics.

    With `balance: gradient` each of the four is multiplied by a factor too, which training measures.
    """

    # The defaults are what was measured to recover most: docs/results.md.
    alpha: Weight = 0.0
    beta: Weight = 1.0
    gamma: Weight = 0.0
    delta: Weight = 0.0
    temperature: Positive = 1.0
    divergence: DivergenceName = "forward_kl"
    divergence_weight: Fraction | None = None
    selective_k: Count = 16
    selective_entropy: Weight = 0.0
    hidden: HiddenLoss = "standardised_mse"
    dynamics: HiddenLoss = "cosine"
    schedule: SchedulesConfig = SchedulesConfig()
    balance: Balance = later("none")

    @model_validator(mode="after")
    def _check(self) -> "LossConfig":
        if not self.terms:
            *weights, last = (keys.weight for keys in TERM_KEYS.values())
            raise ValueError(f"{', '.join(weights)} and {last} are all 0: there is nothing to learn from")
        if self.divergence_weight is not None and self.divergence not in DIVERGENCE_WEIGHTS:
            raise ValueError(
                f"divergence_weight has no effect on {self.divergence}; it belongs to {', '.join(DIVERGENCE_WEIGHTS)}"
            )
        return self

    def ever(self, weight: LossWeight) -> bool:
        """Whether a weight is above 0 at any step."""
        schedule = getattr(self.schedule, weight)
        return getattr(self, weight) > 0 or bool(schedule and schedule.end)

    @property
    def terms(self) -> list[TermName]:
        """The terms that have a weight at any step, as the log calls them."""
        return [term for term, keys in TERM_KEYS.items() if self.ever(keys.weight)]

    def weights_on(self, target: TargetName) -> list[LossWeight]:
        """Return the weights, of those above 0 at any step, whose terms learn from a target."""
        return [TERM_KEYS[term].weight for term in self.terms if target in TERM_KEYS[term].targets]

    @property
    def needs_logits(self) -> bool:
        """Whether the teacher's distribution is learned from at any step."""
        return bool(self.weights_on("logits"))

    @property
    def needs_hidden(self) -> bool:
        """Whether block outputs are learned from at any step."""
        return bool(self.weights_on("hidden"))

    @property
    def temperature_moves(self) -> bool:
        """Whether the temperature is another one at another step."""
        schedule = self.schedule.temperature
        return schedule is not None and schedule.end not in (None, self.temperature)


_Schedule = TypeVar("_Schedule", WeightScheduleConfig, TemperatureScheduleConfig)


def _with_end(schedule: _Schedule) -> _Schedule:
    if (schedule.shape == "constant") == (schedule.end is not None):
        needs = "takes no end" if schedule.shape == "constant" else "needs end, the value at the last step"
        raise ValueError(f"shape {schedule.shape} {needs}")
    return schedule
