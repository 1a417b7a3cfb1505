"""The loss section of a recipe: weights, divergence, kinds of the hidden terms, and what changes over the run."""

from collections.abc import Mapping
from typing import Literal, TypeVar, get_args

from coldstill.pipeline.recipe.fields import Count, Fraction, Positive, Section, WarmupFraction, Weight
from pydantic import model_validator

DivergenceName = Literal[
    "forward_kl", "reverse_kl", "jensen_shannon", "skewed_kl", "bidirectional", "selective", "total_variation"
]
HiddenLoss = Literal["mse", "normalised_mse", "cosine"]
LossWeight = Literal["alpha", "beta", "gamma", "delta"]
# The terms of the loss, as the log calls them, and what the recipe calls the weight of each.
WEIGHT_OF_TERM: Mapping[str, LossWeight] = {
    "loss_task": "alpha",
    "loss_logits": "beta",
    "loss_hidden": "gamma",
    "loss_dynamics": "delta",
}
WEIGHTED_DIVERGENCES = ("jensen_shannon", "skewed_kl", "bidirectional")


class WeightScheduleConfig(Section):
    """How a weight of the loss changes over the run, from the value that the recipe gives it."""

    shape: Literal["constant", "linear", "cosine"] = "linear"
    end: Weight | None = None
    warmup: WarmupFraction = 0.0

    @model_validator(mode="after")
    def _check(self) -> "WeightScheduleConfig":
        return _with_end(self)


class TemperatureScheduleConfig(Section):
    """How the temperature changes over the run, from the one that the recipe gives."""

    shape: Literal["constant", "linear", "cosine", "exponential"] = "linear"
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
    """alpha * cross entropy + beta * divergence * temperature^2 + gamma * hidden + delta * dynamics."""

    alpha: Weight = 0.5
    beta: Weight = 0.5
    gamma: Weight = 0.1
    delta: Weight = 0.0
    temperature: Positive = 2.0
    divergence: DivergenceName = "forward_kl"
    divergence_weight: Fraction | None = None
    selective_k: Count = 16
    selective_entropy: Weight = 0.0
    hidden: HiddenLoss = "mse"  # the default by measured recovery: docs/results.md
    dynamics: HiddenLoss = "cosine"
    schedule: SchedulesConfig = SchedulesConfig()

    @model_validator(mode="after")
    def _check(self) -> "LossConfig":
        if not any(map(self.ever, get_args(LossWeight))):
            raise ValueError("alpha, beta, gamma and delta are all 0: there is nothing to learn from")
        if self.divergence_weight is not None and self.divergence not in WEIGHTED_DIVERGENCES:
            raise ValueError(
                f"divergence_weight has no effect on {self.divergence}; it belongs to {', '.join(WEIGHTED_DIVERGENCES)}"
            )
        return self

    def ever(self, weight: LossWeight) -> bool:
        """Whether a weight is above 0 at any step."""
        schedule = getattr(self.schedule, weight)
        return getattr(self, weight) > 0 or bool(schedule and schedule.end)

    @property
    def terms(self) -> list[str]:
        """The terms that have a weight at any step, as the log calls them."""
        return [term for term, weight in WEIGHT_OF_TERM.items() if self.ever(weight)]

    @property
    def needs_hidden(self) -> bool:
        """Whether block outputs are learned from at any step."""
        return self.ever("gamma") or self.ever("delta")

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
