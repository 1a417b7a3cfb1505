"""Retention and gap closed: what must hold of them, and their standard errors against a bootstrap."""

import random
from statistics import fmean, stdev
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstill.pipeline.outputs.retention import (
    average_covariance,
    covariance_of_means,
    gap_closed,
    independent,
    retention,
)

scores = st.floats(0.05, 1.0)
questions = st.integers(2, 40).flatmap(
    lambda count: st.lists(st.lists(st.floats(0, 1, width=32), min_size=count, max_size=count), min_size=3, max_size=3)
)

# The same where the teacher is better than the pruned model beyond any doubt.
questions_with_a_gap = questions.map(
    lambda samples: [[0.8 + 0.2 * value for value in samples[0]], [0.2 * value for value in samples[1]], samples[2]]
)


def answers(count: int, seed: int) -> list[list[float]]:
    """Right and wrong answers of teacher, pruned and recovered to the same questions, some hard and some easy."""
    rng = random.Random(seed)
    hardness = [rng.betavariate(0.6, 0.6) for _ in range(count)]
    return [
        [float(rng.random() < skill * (1 - hard) + (1 - skill) * 0.25) for hard in hardness]
        for skill in (0.95, 0.3, 0.7)
    ]


def shares(samples: list[list[float]]) -> tuple[float, float]:
    teacher, pruned, recovered = map(fmean, samples)
    return recovered / teacher, (recovered - pruned) / (teacher - pruned)


def estimates(samples: list[list[float]]) -> tuple[Any, Any]:
    teacher, pruned, recovered = map(fmean, samples)
    kept = retention(recovered, teacher, covariance_of_means([samples[2], samples[0]]))
    return kept, gap_closed(teacher, pruned, recovered, covariance_of_means(samples))


@pytest.mark.parametrize("seed", [0, 1])
def test_standard_errors_are_those_of_a_bootstrap_over_the_questions(seed: int):
    samples = answers(500, seed)
    kept, closed = estimates(samples)
    assert (kept.value, closed.value) == pytest.approx(shares(samples))
    rng = random.Random(seed)
    drawn = []
    for _ in range(1000):
        chosen = rng.choices(range(500), k=500)
        drawn.append(shares([[values[index] for index in chosen] for values in samples]))
    assert kept.stderr == pytest.approx(stdev(share for share, _ in drawn), rel=0.1)
    assert closed.stderr == pytest.approx(stdev(share for _, share in drawn), rel=0.1)


def test_questions_that_all_models_find_hard_make_a_ratio_better_known_than_independent_scores_do():
    samples = answers(500, 0)
    teacher, _, recovered = map(fmean, samples)
    own = [covariance_of_means([values])[0][0] ** 0.5 for values in samples]
    apart = retention(recovered, teacher, independent([own[2], own[0]]))
    together, _ = estimates(samples)
    assert together.stderr < 0.9 * apart.stderr


@given(questions)
def test_the_root_of_a_variance_is_the_usual_standard_error_of_a_mean(samples: list[list[float]]):
    covariance = covariance_of_means(samples)
    for place, values in enumerate(samples):
        assert covariance[place][place] ** 0.5 == pytest.approx(stdev(values) / len(values) ** 0.5, abs=1e-9)


@given(questions_with_a_gap)
def test_a_model_that_answers_as_another_does_has_a_share_without_error(samples: list[list[float]]):
    teacher, pruned, _ = samples
    kept, closed = estimates([teacher, pruned, teacher])
    assert (kept.value, kept.stderr) == pytest.approx((1, 0), abs=1e-6)
    assert (closed.value, closed.stderr) == pytest.approx((1, 0), abs=1e-6)
    _, none_closed = estimates([teacher, pruned, pruned])
    assert (none_closed.value, none_closed.stderr) == pytest.approx((0, 0), abs=1e-6)


@given(questions_with_a_gap, st.floats(0.1, 10), st.floats(-5, 5))
def test_shares_know_no_unit_and_a_gap_no_zero(samples: list[list[float]], scale: float, shift: float):
    kept, closed = estimates(samples)
    scaled_kept, _ = estimates([[scale * value for value in values] for values in samples])
    _, moved = estimates([[scale * value + shift for value in values] for values in samples])
    assert (scaled_kept.value, scaled_kept.stderr) == pytest.approx((kept.value, kept.stderr), rel=1e-4, abs=1e-6)
    assert (moved.value, moved.stderr) == pytest.approx((closed.value, closed.stderr), rel=1e-4, abs=1e-6)


@given(scores, scores, st.booleans())
def test_where_pruning_opened_no_gap_none_is_closed(original: float, pruned: float, higher_is_better: bool):
    got = gap_closed(original, pruned, 0.5, None, higher_is_better=higher_is_better)
    is_worse = pruned < original if higher_is_better else pruned > original
    assert (got is not None) == is_worse


@pytest.mark.parametrize(("scale", "is_open"), [(1.0, True), (0.1, False), (-1.0, False)])
@pytest.mark.parametrize("higher_is_better", [True, False])
def test_a_gap_within_its_own_error_is_none_whichever_direction_is_the_better_one(
    scale: float, is_open: bool, higher_is_better: bool
):
    rng = random.Random(0)
    sign = 1 if higher_is_better else -1
    teacher = [rng.gauss(0, 1) for _ in range(100)]
    # Worse by 0.3 on average, where the standard error of the mean difference is 0.1.
    pruned = [value - sign * (0.3 * scale + rng.gauss(0, 1)) for value in teacher]
    recovered = [value - sign * 0.1 for value in teacher]
    samples = [teacher, pruned, recovered]
    closed = gap_closed(*map(fmean, samples), covariance_of_means(samples), higher_is_better=higher_is_better)
    assert (closed is not None) == is_open


@given(questions, st.integers(1, 50))
def test_rows_of_one_length_have_the_error_of_questions(samples: list[list[float]], length: int):
    sums = [[value * length for value in values] for values in samples]
    by_position = covariance_of_means(sums, [length] * len(samples[0]))
    for got, wanted in zip(by_position, covariance_of_means(samples), strict=True):
        assert got == pytest.approx(wanted, rel=1e-6, abs=1e-12)


def test_an_error_that_is_not_known_is_not_made_up():
    assert independent([0.1, None]) is None
    kept = retention(0.4, 0.5, None)
    assert kept is not None
    assert (kept.value, kept.stderr) == (0.8, None)
    assert average_covariance([[[0.1]], None]) is None


def test_a_teacher_that_scores_nothing_leaves_no_retention():
    assert retention(0.4, 0.0, None) is None


@given(questions, questions)
def test_tasks_share_no_question_so_their_average_adds_variances_only(one: list[list[float]], other: list[list[float]]):
    first, second = covariance_of_means(one), covariance_of_means(other)
    average = average_covariance([first, second])
    assert average is not None
    assert average[0][1] == pytest.approx((first[0][1] + second[0][1]) / 4)
