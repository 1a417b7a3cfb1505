"""Bytes, seconds and other amounts as a person reads and writes them."""

import pytest

from coldstill.pipeline.runtime.units import format_amount, format_duration, format_size, parse_amount


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


@pytest.mark.parametrize(
    ("value", "said"), [(5, "5.0 FLOP"), (1.5e3, "1.5 kFLOP"), (138.2e9, "138.2 GFLOP"), (4e17, "400.0 PFLOP")]
)
def test_amounts_are_in_powers_of_a_thousand(value: float, said: str):
    assert format_amount(value, "FLOP") == said


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [("1e9", "", 1e9), ("400T", "FLOP", 4e14), ("989.5 tflop", "FLOP", 9.895e14), (" 80 GB", "B", 8e10), ("7", "B", 7)],
)
def test_amounts_are_read_as_people_write_them(text: str, unit: str, value: float):
    assert parse_amount(text, unit=unit) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "lots", "0", "-3G", "1e999", "80 GW", "1.2.3"])
def test_what_is_no_amount_is_refused(text: str):
    with pytest.raises(ValueError, match=r"is no amount above 0; expected one such as 1e9 or 4TB"):
        parse_amount(text, unit="B")
