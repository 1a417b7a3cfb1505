"""What of a model's ability is left, and what training brought back, with standard errors; floats in, floats out.

All models answer the same questions, so their scores rise and fall together: a question that is hard for one is hard
for all. A ratio of two scores is therefore known better than either score, and its error needs their covariance.

Every error here is the delta method's: for f of scores with covariance C and gradient g, Var f = g' C g. It holds to
first order, where the error of a denominator is small beside the denominator: a gap that is no larger than its own
error gives a share whose error is larger than itself, and says with that how little it says. Questions are taken as
independent draws of all that could have been asked.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

Matrix = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error.

    Attributes:
        value: The value.
        stderr: Its standard error; None where it is not known.
    """

    value: float
    stderr: float | None


def covariance_of_means(samples: Matrix) -> list[list[float]]:
    """Give the covariances of the models' mean scores over the same N questions.

    Cov(a, b) = sum over questions of (a - mean a)(b - mean b) / (N (N - 1)): on the diagonal the square of the usual
    standard error of a mean.

    Args:
        samples: For each model its value of each question, in the same order; at least two questions.
    """
    count = len(samples[0])
    means = [fmean(values) for values in samples]
    centred = [[value - mean for value in values] for values, mean in zip(samples, means, strict=True)]
    return [
        [math.fsum(a * b for a, b in zip(first, second, strict=True)) / (count * (count - 1)) for second in centred]
        for first in centred
    ]


def independent(stderrs: Sequence[float | None]) -> list[list[float]] | None:
    """Give the covariances of scores of which only their errors are known, as if they knew nothing of each other.

    That overstates the error of a ratio of scores that rise and fall together. None where an error is not known.
    """
    known = [stderr for stderr in stderrs if stderr is not None]
    if len(known) < len(stderrs):
        return None
    return [[stderr**2 if row == column else 0.0 for column in range(len(known))] for row, stderr in enumerate(known)]


def retention(after: float, original: float, covariance: Matrix | None) -> Estimate | None:
    """Divide what a model scores after a change by what the original scores; None where the original scores nothing.

    With R the ratio, Var R = (Var after - 2 R Cov(after, original) + R^2 Var original) / original^2. The covariance is
    that of (after, original); None where it is not known.
    """
    if original <= 0:
        return None
    ratio = after / original
    return Estimate(ratio, _stderr([1 / original, -ratio / original], covariance))


def gap_closed(
    original: float, pruned: float, after: float, covariance: Matrix | None, *, higher_is_better: bool = True
) -> Estimate | None:
    """Give (after - pruned) / (original - pruned), the share of a gap that training closed.

    None where pruning opened no gap: the pruned model is as good as the original or better. A gap that may be chance
    gives its share all the same, and the standard error says what it is worth.

    With G the share and g the gap, the gradient in (original, pruned, after) is (-G, G - 1, 1) / g. The covariance is
    that of (original, pruned, after); None where it is not known.
    """
    gap = original - pruned
    if gap == 0 or (gap > 0) != higher_is_better:
        return None
    share = (after - pruned) / gap
    return Estimate(share, _stderr([-share / gap, (share - 1) / gap, 1 / gap], covariance))


def average_covariance(covariances: Sequence[Matrix | None]) -> list[list[float]] | None:
    """Give the covariances of scores averaged over tasks, which share no question; None where one is not known."""
    known = [covariance for covariance in covariances if covariance is not None]
    if not known or len(known) < len(covariances):
        return None
    size = range(len(known[0]))
    return [[sum(matrix[row][column] for matrix in known) / len(known) ** 2 for column in size] for row in size]


def _stderr(gradient: Sequence[float], covariance: Matrix | None) -> float | None:
    if covariance is None:
        return None
    variance = math.fsum(
        one * other * covariance[row][column]
        for row, one in enumerate(gradient)
        for column, other in enumerate(gradient)
    )
    return math.sqrt(max(variance, 0.0))  # rounding: models that answer alike leave a variance of -1e-20
