"""Values of the loss that change over a run: a pure function of the step, so that a resumed run meets the same ones."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from coldstill.pipeline.recipe.loss import LossConfig, LossWeight, ScheduleShape

# The value between start and end, where 0 to 1 of the way is gone.
SHAPES: Mapping[ScheduleShape, Callable[[float, float, float], float]] = {
    "constant": lambda start, _end, _way: start,
    "linear": lambda start, end, way: start + (end - start) * way,
    "cosine": lambda start, end, way: start + (end - start) * ((1.0 - math.cos(math.pi * way)) / 2.0),
    "exponential": lambda start, end, way: start * (end / start) ** way,
}


@dataclass(frozen=True)
class Schedule:
    """From one value at the first step to another at the last.

    Attributes:
        shape: `constant`, `linear`, `cosine` (half a wave: slow, fast, slow) or `exponential` (a constant ratio a step;
            both values are above 0).
        start: The value at the first step.
        end: The value at the last; equal to `start` where the shape is constant.
        warmup: The share of the steps at the beginning that keep `start`.
    """

    shape: ScheduleShape
    start: float
    end: float
    warmup: float = 0.0

    @classmethod
    def of(cls, section: LossConfig, key: LossWeight | Literal["temperature"]) -> "Schedule | None":
        """Return the schedule that a recipe gives a weight or the temperature; None where it gives none."""
        schedule = getattr(section.schedule, key)
        if schedule is None:
            return None
        start = getattr(section, key)
        return cls(schedule.shape, start, start if schedule.end is None else schedule.end, schedule.warmup)

    def at(self, step: int, num_steps: int) -> float:
        """Return the value at a step, counted from 0, of a run of so many."""
        first = int(self.warmup * num_steps)
        way = (step - first) / max(num_steps - 1 - first, 1)
        way = min(max(way, 0.0), 1.0)
        return SHAPES[self.shape](self.start, self.end, way)
