"""Bytes, seconds and other amounts as a person reads and writes them."""

import re
from collections.abc import Mapping

_FACTORS: Mapping[str, float] = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?(?:E\d+)?)\s*([KMGTP]?)(.*)")


def parse_amount(text: str, *, unit: str = "") -> float:
    """Read an amount as people write it: 1e9, 400T, 80 GB, in powers of 1000; its unit may be left out.

    Raises:
        ValueError: It is none, or not above 0.
    """
    match = _AMOUNT.fullmatch(text.strip().upper())
    value = float(match[1]) * _FACTORS[match[2]] if match and match[3] in ("", unit.upper()) else 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"{text!r} is no amount above 0; expected one such as 1e9 or 4T{unit}")
    return value


def format_amount(value: float, unit: str) -> str:
    """Return an amount as a person reads it, in powers of 1000."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:,.1f} {prefix}{unit}"
        value /= 1000
    return f"{value:,.1f} P{unit}"


def format_size(num_bytes: float) -> str:
    """Return a number of bytes as a person reads it, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:,.0f} B" if unit == "B" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"


def format_duration(seconds: float) -> str:
    """Return a time as a person reads it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
