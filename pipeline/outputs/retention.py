"""What of a model's ability is left, and what training brought back, with standard errors; floats in, floats out.

All models answer the same questions, so their scores rise and fall together: a question that is hard for one is hard
for all. A ratio of two scores is therefore known better than either score, and its error needs their covariance.

Every error here is the delta method's: for f of scores with covariance C and gradient g, Var f = g' C g. It holds to
first order, where the error of a denominator is small beside the denominator. So a share of a gap is given where there
is a gap: where the 95% interval of what pruning took lies above 0. Elsewhere the share is anything between minus and
plus infinity (Fieller, 1954), and None stands for it. Questions, and rows of text, are taken as independent draws of
all that could have been asked or read.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Matrix = Sequence[Sequence[float]]

INTERVAL = 1.96  # standard errors on either side of a value, for 95%
# What is said where a share of a gap would stand, and why.
NO_GAP = "no gap"
NO_GAP_REASON = (
    f"{NO_GAP}: pruning left the student no worse than the teacher by more than the error of the difference (95%), so "
    "there is nothing to close"
)


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error.

    Attributes:
        value: The value.
        stderr: Its standard error; None where it is not known.
    """

    value: float
    stderr: float | None


def covariance_of_means(sums: Matrix, counts: Sequence[int] | None = None) -> list[list[float]]:
    """Return the covariances of the models' means over the same N questions, or rows of text.

    A row counts as many times as it has positions: mean a = sum of a / sum of counts, a ratio of two sums, for which
    Cov(a, b) = N / (N - 1) * sum over rows of (a - mean a * count)(b - mean b * count) / (sum of counts)^2. With a
    count of 1 each that is the usual covariance of two means, on the diagonal the square of the usual standard error.

    Args:
        sums: For each model its value of each question, or its sum over the positions of each row, in the same order;
            at least two of them.
        counts: Positions of each row; 1 each where they are not given.
    """
    num = len(sums[0])
    counts = counts or [1] * num
    total = sum(counts)
    means = [math.fsum(values) / total for values in sums]
    centred = [
        [value - mean * count for value, count in zip(values, counts, strict=True)]
        for values, mean in zip(sums, means, strict=True)
    ]
    scale = num / (num - 1) / total**2
    return [
        [scale * math.fsum(a * b for a, b in zip(first, second, strict=True)) for second in centred]
        for first in centred
    ]


def independent(stderrs: Sequence[float | None]) -> list[list[float]] | None:
    """Return the covariances of scores of which only their errors are known, as if they knew nothing of each other.

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


def improvement(before: float, after: float, covariance: Matrix | None, *, higher_is_better: bool = True) -> Estimate:
    """Return how much better `after` is than `before`: below 0 where it is worse, whichever direction is better.

    The covariance is that of (before, after); None where it is not known.
    """
    sign = 1.0 if higher_is_better else -1.0
    return Estimate(sign * (after - before), _stderr([-sign, sign], covariance))


def is_above_zero(difference: Estimate, *, rounding: float = 0.0) -> bool:
    """Whether a difference is there: its 95% interval lies above 0; where the error is not known, its value does.

    This decides, of what pruning took, whether there is a gap to close at all.

    Args:
        difference: How much better one model is than another.
        rounding: What is no difference in any case: how exact the values themselves are.
    """
    error = max(INTERVAL * (difference.stderr or 0.0), rounding)
    return math.isfinite(difference.value) and difference.value > error


def gap_closed(
    original: float, pruned: float, after: float, covariance: Matrix | None, *, higher_is_better: bool = True
) -> Estimate | None:
    """Return (after - pruned) / (original - pruned), the share of a gap that training closed.

    None where pruning opened no gap: the pruned model is not worse than the original by more than the error of their
    difference, see `is_above_zero`.

    With G the share and g the gap, the gradient in (original, pruned, after) is (-G, G - 1, 1) / g. The covariance is
    that of (original, pruned, after); None where it is not known.
    """
    if not is_above_zero(
        improvement(pruned, original, covariance_of(covariance, (1, 0)), higher_is_better=higher_is_better)
    ):
        return None
    gap = original - pruned
    share = (after - pruned) / gap
    return Estimate(share, _stderr([-share / gap, (share - 1) / gap, 1 / gap], covariance))


def covariance_of(covariance: Matrix | None, places: Sequence[int]) -> list[list[float]] | None:
    """Return the covariances of some of the scores, in the order of their places; None where they are not known."""
    if covariance is None:
        return None
    return [[covariance[row][column] for column in places] for row in places]


def average_covariance(covariances: Sequence[Matrix | None]) -> list[list[float]] | None:
    """Return the covariances of scores averaged over tasks, which share no question; None where one is not known."""
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
