"""Differences on held-out text: their direction, their errors against a bootstrap over rows, and where no gap is."""

import math
import random
from statistics import stdev

import pytest

from coldstill.pipeline.judging.qualities import (
    HIGHER_IS_BETTER,
    Quality,
    RowSums,
    differences,
    quality_of,
    shares_closed,
)
from coldstill.pipeline.outputs.retention import Estimate

NUM_ROWS = 300
LOSSES = {"teacher": 3.0, "pruned": 3.1, "recovered": 3.05}


def rows(*, worse: float, seed: int = 0, kl: float = 0.3) -> tuple[dict[str, RowSums], list[int]]:
    """Teacher, pruned and recovered on rows of unlike lengths, hard ones and easy ones, in nats and agreements.

    The pruned student's loss is worse by so much a token on average; 0.2 of deviation from row to row.
    """
    rng = random.Random(seed)
    counts = [rng.randint(5, 60) for _ in range(NUM_ROWS)]
    hardness = [rng.gauss(4.0, 1.0) for _ in counts]

    def model(more: float, kl: float, share: float) -> RowSums:
        losses = [(hard + more + rng.gauss(0, 0.2)) * count for hard, count in zip(hardness, counts, strict=True)]
        kls = [kl * rng.uniform(0.5, 1.5) * count for count in counts]
        agreed = [float(sum(rng.random() < share for _ in range(count))) for count in counts]
        return RowSums(losses, kls, agreed)

    teacher = RowSums(model(0.0, 0.0, 1.0).loss, [0.0] * NUM_ROWS, [float(count) for count in counts])
    return {"teacher": teacher, "pruned": model(worse, kl, 0.6), "recovered": model(worse / 4, kl / 4, 0.8)}, counts


def taken(sums: RowSums, chosen: list[int]) -> RowSums:
    return RowSums(*([values[row] for row in chosen] for values in (sums.loss, sums.kl, sums.agreement)))


@pytest.mark.parametrize("measure", HIGHER_IS_BETTER)
def test_errors_of_gaps_and_gains_are_those_of_a_bootstrap_over_the_rows(measure: str):
    sums, counts = rows(worse=0.1)
    found = differences(sums, counts)
    rng = random.Random(1)
    gaps, gains = [], []
    for _ in range(400):
        chosen = rng.choices(range(NUM_ROWS), k=NUM_ROWS)
        drawn = {name: quality_of(taken(one, chosen), [counts[row] for row in chosen]) for name, one in sums.items()}
        teacher, pruned, recovered = (getattr(drawn[name], measure) for name in ("teacher", "pruned", "recovered"))
        sign = 1 if HIGHER_IS_BETTER[measure] else -1
        gaps.append(sign * (teacher - pruned))
        gains.append(sign * (recovered - pruned))
    assert found.gaps[measure].stderr == pytest.approx(stdev(gaps), rel=0.15)
    assert found.gains[measure].stderr == pytest.approx(stdev(gains), rel=0.15)
    assert found.gaps[measure].value > 0
    assert found.gains[measure].value > 0


def test_hard_rows_are_hard_for_every_model_so_a_difference_is_better_known_than_a_loss():
    sums, counts = rows(worse=0.1)
    of_loss = stdev(one / count for one, count in zip(sums["pruned"].loss, counts, strict=True)) / NUM_ROWS**0.5
    stderr = differences(sums, counts).gaps["loss"].stderr
    assert stderr is not None
    assert stderr < 0.5 * of_loss


@pytest.mark.parametrize(
    ("worse", "is_open"),
    [(0.1, True), (0.0, False), (0.01, False), (-0.1, False)],
    ids=["gap", "equal", "noise", "better"],
)
def test_a_pruned_student_no_worse_than_its_teacher_leaves_no_gap_in_loss_and_none_in_perplexity(
    worse: float, is_open: bool
):
    sums, counts = rows(worse=worse)
    closed = differences(sums, counts).gap_closed
    assert (closed["loss"] is not None, closed["perplexity"] is not None) == (is_open, is_open)
    # The same student is another distribution all the same.
    assert closed["kl"] == pytest.approx(0.75, abs=0.03)
    assert closed["agreement"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_a_share_of_two_hundred_percent_of_next_to_nothing_is_never_given(seed: int):
    sums, counts = rows(worse=0.015, seed=seed)
    found = differences(sums, counts)
    for measure, share in found.gap_closed.items():
        gap = found.gaps[measure]
        assert gap.stderr is not None
        assert (share is not None) == (gap.value > 1.96 * gap.stderr), measure


def test_the_teacher_as_its_own_student_has_no_gap_but_that_of_rounding():
    sums, counts = rows(worse=0.0)
    itself = RowSums(sums["teacher"].loss, [1e-5 * count for count in counts], sums["teacher"].agreement)
    found = differences({"teacher": sums["teacher"], "pruned": itself, "recovered": sums["recovered"]}, counts)
    assert set(found.gap_closed.values()) == {None}


def test_one_row_says_nothing_of_an_error_and_the_direction_decides():
    one = {name: taken(sums, [0]) for name, sums in rows(worse=1.0)[0].items()}
    found = differences(one, [20])
    assert {gap.stderr for gap in found.gaps.values()} == {None}
    assert found.gap_closed["loss"] is not None
    better = differences({**one, "pruned": one["teacher"], "teacher": one["pruned"]}, [20])
    assert better.gap_closed["loss"] is None


def test_before_training_there_are_gaps_and_no_shares():
    sums, counts = rows(worse=0.1)
    del sums["recovered"]
    found = differences(sums, counts)
    assert found.gaps["loss"].value == pytest.approx(0.1, abs=0.05)
    assert (found.gains, found.gap_closed) == ({}, {})


def test_a_model_without_a_finite_perplexity_has_no_share_of_it():
    sums, counts = rows(worse=800.0)
    found = differences(sums, counts)
    assert math.isinf(quality_of(sums["pruned"], counts).perplexity)
    assert found.gap_closed["perplexity"] is None
    assert found.gap_closed["loss"] == pytest.approx(0.75, abs=0.01)


def test_the_figures_that_a_user_saw_have_no_gap():
    models = {
        name: vars(Quality(math.log(perplexity), perplexity, 0.0, 1.0))
        for name, perplexity in (("teacher", 138.76), ("pruned", 135.21), ("recovered", 123.02))
    }
    gaps = {measure: Estimate(135.21 - 138.76, None) for measure in HIGHER_IS_BETTER}
    assert shares_closed(models, gaps)["perplexity"] is None


@pytest.mark.parametrize("is_open", [True, False])
def test_the_perplexity_has_a_gap_exactly_where_the_loss_has_one_however_its_own_error_is_rounded(is_open: bool):
    models = {name: vars(Quality(loss, math.exp(loss), 0.1, 0.5)) for name, loss in LOSSES.items()}
    gaps = {measure: Estimate(1.0, 0.1) for measure in HIGHER_IS_BETTER}
    gaps |= {"loss": Estimate(0.1, 0.01 if is_open else 0.1), "perplexity": Estimate(1.0, 1.0 if is_open else 0.1)}
    closed = shares_closed(models, gaps)
    assert (closed["loss"] is not None, closed["perplexity"] is not None) == (is_open, is_open)
