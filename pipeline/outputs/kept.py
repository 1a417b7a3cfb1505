"""Which step of a run was kept as its best, and by what: part of the run's record."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kept:
    """The step that was the best of a run, and what it is the best by.

    Attributes:
        measure: What it goes by, as the log calls it; lower is better.
        step: The step; 0 is before training.
        value: Of the measure there.
        last_step: The last step that was judged, which is the run's last one unless `eval_delay` puts it off.
        last_value: Of the measure there.
        start_value: Of the measure before training; None where that was not judged.
    """

    measure: str
    step: int
    value: float
    last_step: int
    last_value: float
    start_value: float | None

    def __str__(self) -> str:
        """Say it in words."""
        others = []
        if self.step != self.last_step:
            others.append(f"{self.last_value:.4f} at the last step")
        if self.start_value is not None and self.step:
            others.append(f"{self.start_value:.4f} before training")
        where = f"step {self.step} of {self.last_step}" if self.step else "the student as it was before training"
        return f"{where}: {self.measure} {self.value:.4f}" + (f" ({', '.join(others)})" if others else "")
