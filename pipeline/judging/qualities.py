"""Models on eval rows: means over positions, and by how much one model is better than another, with its error.

Floats in, floats out: no model, no store. All models read the same rows, so the error of a difference is estimated from
the rows' paired differences: rows are taken as independent draws of all the text that could have been read. Rows of one
document resemble each other, so the error is rather too small than too large.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from coldstill.pipeline.outputs.retention import (
    Estimate,
    Matrix,
    covariance_of,
    covariance_of_means,
    improvement,
    is_above_zero,
)

# Whether a higher value is the better one.
HIGHER_IS_BETTER = {"loss": False, "perplexity": False, "kl": False, "agreement": True}
# How exact values are. The teacher's states are stored in float16, and it may have run in bfloat16 where a student runs
# in float32: a KL below this is that of a model to itself. The other measures err in either direction.
_ROUNDING = {"kl": 1e-4}


@dataclass(frozen=True)
class Quality:
    """A model on the eval rows, averaged over the positions that count.

    Attributes:
        loss: Cross entropy with the text, in nats a token.
        perplexity: exp(loss).
        kl: KL(teacher || model) over the whole vocabulary at temperature 1, in nats a token; 0 of the teacher.
        agreement: Share of positions where model and teacher have the same likeliest token; 1 of the teacher.
    """

    loss: float
    perplexity: float
    kl: float
    agreement: float


@dataclass(frozen=True)
class RowSums:
    """A model on each eval row, summed over the positions that count.

    Attributes:
        loss: Cross entropy with the text, in nats.
        kl: KL(teacher || model), in nats.
        agreement: How many positions agree with the teacher.
    """

    loss: list[float]
    kl: list[float]
    agreement: list[float]

    def of(self, rows: range) -> "RowSums":
        """Return those of some rows."""
        chosen = slice(rows.start, rows.stop)
        return RowSums(self.loss[chosen], self.kl[chosen], self.agreement[chosen])


@dataclass(frozen=True)
class Differences:
    """What pruning took and training brought back, by measure.

    Attributes:
        gaps: How much worse the pruned student is than the teacher, above 0 where it is worse, with the standard error
            of that difference, from paired rows; None where there is one row.
        gains: How much better the recovered student is than the pruned one, likewise; empty before training.
        gap_closed: (recovered - pruned) / (teacher - pruned); None where the pruned student is not worse than the
            teacher by more than 1.96 standard errors, so that there is no gap. Empty before training.
    """

    gaps: dict[str, Estimate]
    gains: dict[str, Estimate]
    gap_closed: dict[str, float | None]


@dataclass(frozen=True)
class Domain:
    """The models on the eval rows of one of several sources.

    Attributes:
        models: `teacher`, `pruned` and, once it is trained, `recovered`.
        gaps: As in `Differences`, and so the next two.
        gains: By measure.
        gap_closed: By measure.
        num_tokens: Positions that counted.
        num_rows: Its rows.
    """

    models: dict[str, Quality]
    gaps: dict[str, Estimate]
    gains: dict[str, Estimate]
    gap_closed: dict[str, float | None]
    num_tokens: int
    num_rows: int


def domain_of(sums: Mapping[str, RowSums], counts: Sequence[int], rows: range) -> Domain:
    """Compare the models over some of the rows alone."""
    of_rows = {name: found.of(rows) for name, found in sums.items()}
    own_counts = counts[rows.start : rows.stop]
    found = differences(of_rows, own_counts)
    models = {name: quality_of(own, own_counts) for name, own in of_rows.items()}
    return Domain(models, found.gaps, found.gains, found.gap_closed, sum(own_counts), len(own_counts))


def quality_of(sums: RowSums, counts: Sequence[int]) -> Quality:
    """Average over the positions of all rows, whose numbers are the counts."""
    total = sum(counts)
    loss, kl, agreement = (math.fsum(values) / total for values in (sums.loss, sums.kl, sums.agreement))
    # A loss beyond 700 nats overflows a float: such a model has no perplexity worth a number.
    return Quality(loss, math.exp(loss) if loss < 700 else math.inf, kl, agreement)


def differences(sums: Mapping[str, RowSums], counts: Sequence[int]) -> Differences:
    """Compare `teacher`, `pruned` and, where it is there, `recovered` over the same rows."""
    models = {name: asdict(quality_of(of_rows, counts)) for name, of_rows in sums.items()}
    gaps, gains = dict[str, Estimate](), dict[str, Estimate]()
    for measure, is_higher in HIGHER_IS_BETTER.items():
        covariance = _covariance(list(sums.values()), counts, measure, [models[name][measure] for name in sums])
        teacher, pruned, *trained = (models[name][measure] for name in sums)
        gaps[measure] = improvement(pruned, teacher, covariance_of(covariance, (1, 0)), higher_is_better=is_higher)
        for recovered in trained:
            gains[measure] = improvement(
                pruned, recovered, covariance_of(covariance, (1, 2)), higher_is_better=is_higher
            )
    return Differences(gaps, gains, shares_closed(models, gaps))


def shares_closed(models: Mapping[str, Mapping[str, float]], gaps: Mapping[str, Estimate]) -> dict[str, float | None]:
    """Give, by measure, the share of the gap that training closed; None where there is no gap, and {} before training.

    The perplexity is the exponential of the loss: it has a gap exactly where the loss has one.
    """
    if "recovered" not in models:
        return {}
    closed: dict[str, float | None] = {}
    for measure in HIGHER_IS_BETTER:
        teacher, pruned, recovered = (models[name][measure] for name in ("teacher", "pruned", "recovered"))
        gap = gaps["loss" if measure == "perplexity" else measure]
        is_open = is_above_zero(gap, rounding=_ROUNDING.get(measure, 0.0)) and teacher != pruned
        share = (recovered - pruned) / (teacher - pruned) if is_open else math.nan
        closed[measure] = share if math.isfinite(share) else None
    return closed


def _covariance(sums: Sequence[RowSums], counts: Sequence[int], measure: str, values: Sequence[float]) -> Matrix | None:
    """Return the covariances of the models' values; those of perplexities by the delta method, d exp(x) = exp(x) dx."""
    if len(counts) < 2 or not all(map(math.isfinite, values)):
        return None
    if measure != "perplexity":
        return covariance_of_means([getattr(of_rows, measure) for of_rows in sums], counts)
    losses = covariance_of_means([of_rows.loss for of_rows in sums], counts)
    return [[one * other * losses[row][place] for place, other in enumerate(values)] for row, one in enumerate(values)]
