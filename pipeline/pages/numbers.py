"""How a report writes its figures: measures with their units, errors, shares."""

import math
from collections.abc import Mapping
from typing import Any

# Of each measure of held-out text: its name, and its unit.
MEASURES = {
    "loss": ("loss", "nats a token"),
    "perplexity": ("perplexity", "exp of the loss"),
    "kl": ("KL to teacher", "nats a token"),
    "agreement": ("top-1 agreement", "% of tokens"),
}


def heading(measure: str) -> str:
    """Name a measure with its unit."""
    name, unit = MEASURES[measure]
    return f"{name} ({unit})"


def show_measure(measure: str, value: float | None) -> str:
    """Write a measure's value as its table does."""
    if value is None:
        return "-"
    if measure == "agreement":
        return percent(value)
    if measure == "perplexity":
        return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"
    return f"{value:.4f}"


def percent(value: float | None) -> str:
    """Write a share."""
    return "-" if value is None else f"{100 * value:,.1f}%"


def estimate(found: Mapping[str, Any] | None, *, is_share: bool = True) -> str:
    """Write a value with its standard error, where that is known."""
    if found is None:
        return "-"
    show = percent if is_share else "{:,.2f}".format
    stderr = found["stderr"]
    return show(found["value"]) if stderr is None else f"{show(found['value'])} ± {show(stderr)}"


def is_number(value: float | None) -> bool:
    """Whether there is a value that can be drawn."""
    return value is not None and math.isfinite(value)


def list_words(words: list[str]) -> str:
    """Join words as a sentence does."""
    return ", ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} and {words[-1]}"
