"""How the terms of a loss share its gradient, and the factors that keep it in the proportion of their weights.

After GradNorm (Chen et al., arXiv 1711.02257), which learns the factors; here they follow from the norms at once.
"""

import math
from collections.abc import Mapping

# Of the logarithm of a norm: what a new measurement counts beside those before it.
_NEWEST = 0.5
# A term whose gradient has all but vanished, as behind a fresh projector, is not blown up without end.
_LARGEST_FACTOR = 100.0


def smoothed(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """Return the running geometric mean of norms, by term; what is 0 or not finite changes nothing.

    Args:
        before: The mean so far; empty at first.
        now: As they were measured just now.
    """
    mean = dict(before)
    for name, norm in now.items():
        if norm > 0 and math.isfinite(norm):
            mean[name] = before[name] ** (1 - _NEWEST) * norm**_NEWEST if name in before else norm
    return mean


def balance_factors(norms: Mapping[str, float], anchor: str) -> dict[str, float]:
    """Return what to multiply each term's weight by, so that weighted gradients are as the weights are to each other.

    Args:
        norms: Of the terms' gradients, before weights; above 0. A term without one keeps its weight.
        anchor: The term whose weight stays, so that the learning rate means what it did.
    """
    if anchor not in norms:
        return {}
    return {name: min(norms[anchor] / norm, _LARGEST_FACTOR) for name, norm in norms.items()}


def gradient_shares(norms: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """Return the norm of each term's weighted gradient as a share of their sum; empty where they have none.

    Args:
        norms: Of the terms' gradients, before weights.
        weights: By term.
    """
    weighted = {name: weights[name] * norm for name, norm in norms.items()}
    total = sum(weighted.values())
    if not (total > 0 and math.isfinite(total)):
        return {}
    return {name: value / total for name, value in weighted.items()}
