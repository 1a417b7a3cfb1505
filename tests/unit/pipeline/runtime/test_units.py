"""Bytes and seconds as a person reads them."""

import pytest

from coldstill.pipeline.runtime.units import format_duration, format_size


@pytest.mark.parametrize(
    ("num_bytes", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_250_000, "1.2 MB"),
        (412.6e9, "412.6 GB"),
        (3e12, "3.0 TB"),
        (1.5e15, "1,500.0 TB"),
    ],
)
def test_sizes_are_in_powers_of_a_thousand(num_bytes: float, said: str):
    assert format_size(num_bytes) == said


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (119.4, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2.0 h")]
)
def test_times_are_in_the_unit_that_a_person_would_take(seconds: float, said: str):
    assert format_duration(seconds) == said
