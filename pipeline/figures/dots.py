"""The figures of a comparison: dots with error bars, one row a variant; and shares of a gap. From plain data."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coldstill.pipeline.figures.sheet import INK, LIGHT, Figure, Sheet

_ROW = 30.0
_LEVEL = 13.0
_NAME_CHARS = 17
# A level this many times the dots' own range away would press them together: it is named in the caption instead.
_FAR = 2.0


@dataclass(frozen=True)
class DotRow:
    """One row of a figure of dots.

    Attributes:
        name: Of the variant.
        mean: None where there is no figure.
        deviation: Half the length of the error bar; None for none.
        dots: The single runs.
        before: What the student was before training; None where one level says it for all rows.
        status: What stands in the row of a variant without a mean, such as `failed`.
    """

    name: str
    mean: float | None
    deviation: float | None = None
    dots: Sequence[float] = ()
    before: float | None = None
    status: str = ""


def dots_figure(
    name: str,
    title: str,
    rows: Sequence[DotRow],
    *,
    x_label: str,
    levels: Mapping[str, float],
    caption: str,
    y_label: str = "variant",
) -> Figure:
    """Draw mean, deviation and single runs of each variant, the first at the top.

    Args:
        name: Of the figure's files.
        title: What it shows.
        rows: At least one with a mean.
        x_label: With its unit.
        levels: Vertical lines to hold the dots against, by name; one that is far off is named in the caption.
        caption: How to read it.
        y_label: What a row is.
    """
    values = [value for row in rows for value in _extent(row) if math.isfinite(value)]
    low, high = min(values), max(values)
    reach = max(high - low, abs(high) * 0.02)
    near = {label: value for label, value in levels.items() if low - _FAR * reach <= value <= high + _FAR * reach}
    height = max(len(rows) * _ROW, 2 * _ROW) + _LEVEL * len(near)
    sheet = Sheet(title, x_label=x_label, y_label=y_label, height=height)
    axes = sheet.axes
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    ends = [low, high, *near.values()]
    margin = 0.06 * (max(ends) - min(ends) or reach)
    axes.set_xlim(min(ends) - margin, max(ends) + margin)
    axes.locator_params(axis="x", nbins=5)
    for index, row in enumerate(rows):
        _draw_row(axes, row, index)
    axes.set_yticks(range(len(rows)), list(map(_label, rows)))
    axes.set_ylim(len(rows) - 0.5, -0.5 - _LEVEL * len(near) / _ROW)
    _draw_levels(axes, near)
    far = "".join(f" Off the scale: {label} {value:.4g}." for label, value in levels.items() if label not in near)
    return sheet.finish(name, caption=caption + far, description=f"{x_label}. {'; '.join(map(_said, rows))}.{far}")


def _extent(row: DotRow) -> list[float]:
    if row.mean is None:
        return []
    bar = row.deviation or 0.0
    before = [] if row.before is None else [row.before]
    return [row.mean - bar, row.mean + bar, *row.dots, *before]


def _draw_row(axes: Any, row: DotRow, index: int) -> None:
    axes.axhline(index, color=INK, alpha=0.1, linewidth=0.8)
    if row.mean is None or not math.isfinite(row.mean):
        return
    if row.before is not None and math.isfinite(row.before):
        axes.plot([row.before, row.mean], [index, index], color=LIGHT[0], linewidth=1.2, alpha=0.5)
        axes.plot(row.before, index, "D", markersize=5, markeredgecolor=LIGHT[0], markerfacecolor="none")
    if len(row.dots) > 1:
        axes.plot(row.dots, [index + 0.24] * len(row.dots), "o", markersize=3.6, color=LIGHT[6], alpha=0.9)
    axes.errorbar(
        row.mean,
        index,
        xerr=row.deviation,
        fmt="o",
        markersize=6,
        color=LIGHT[0],
        ecolor=LIGHT[0],
        elinewidth=1.8,
        capsize=3.5,
        capthick=1.5,
    )


def _draw_levels(axes: Any, levels: Mapping[str, float]) -> None:
    """Draw lines down, each named above the rows in a line of its own, on the side that has room."""
    low, high = axes.get_xlim()
    for index, (label, value) in enumerate(sorted(levels.items(), key=lambda level: level[1])):
        dash = (0, (1, 2)) if label == "teacher" else (0, (5, 3))
        axes.axvline(value, color=INK, linewidth=1.1, alpha=0.75, linestyle=dash)
        # Outwards, so that no line crosses a neighbour's name.
        place = (value - low) / (high - low)
        is_left = place < 0.2 if index == 0 else place < 0.8
        axes.annotate(
            label,
            (value, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3 if is_left else -3, -_LEVEL * index - 1),
            textcoords="offset points",
            ha="left" if is_left else "right",
            va="top",
            fontsize=9.5,
        )


def _label(row: DotRow) -> str:
    """Return a row's name in one or two lines, and what there is instead of a dot."""
    status = row.status if row.mean is None else "" if math.isfinite(row.mean) else f"{row.mean:g}"
    lines = textwrap.wrap(row.name, _NAME_CHARS)
    room = 1 if status else 2
    if len(lines) > room:
        lines = [*lines[: room - 1], lines[room - 1][: _NAME_CHARS - 1].rstrip(" ,") + "…"]
    return "\n".join([*lines, f"({status})"] if status else lines)


def _said(row: DotRow) -> str:
    if row.mean is None:
        return f"{row.name}: {row.status}"
    bar = "" if row.deviation is None else f" ± {row.deviation:.2g}"
    return f"{row.name}: {row.mean:.4g}{bar}"
