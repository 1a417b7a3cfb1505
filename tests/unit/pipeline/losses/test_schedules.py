"""Values of a schedule, step by step, by their definition."""

import math

import pytest

from coldstill.pipeline.losses.schedules import Schedule


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("constant", [4.0, 4.0, 4.0, 4.0, 4.0]),
        ("linear", [4.0, 3.25, 2.5, 1.75, 1.0]),
        ("cosine", [1 + 3 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(5)]),
        ("exponential", [4.0, 4.0**0.75, 2.0, 4.0**0.25, 1.0]),
    ],
)
def test_a_shape_goes_from_start_to_end(shape: str, expected: list[float]):
    schedule = Schedule(shape, start=4.0, end=1.0)
    assert [schedule.at(step, 5) for step in range(5)] == pytest.approx(expected)


def test_warmup_keeps_the_first_value_and_the_rest_still_ends_at_the_end():
    schedule = Schedule("linear", start=0.0, end=1.0, warmup=0.4)
    assert [schedule.at(step, 10) for step in range(10)] == pytest.approx([0, 0, 0, 0, 0, 0.2, 0.4, 0.6, 0.8, 1.0])


def test_a_run_of_one_step_has_the_first_value():
    assert Schedule("linear", start=3.0, end=1.0).at(0, 1) == 3.0


def test_beyond_the_last_step_the_end_stays():
    assert Schedule("cosine", start=3.0, end=1.0).at(7, 5) == pytest.approx(1.0)
