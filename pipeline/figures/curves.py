"""Figures of curves: values over steps, epochs or an index, one line a series. From plain data."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from coldstill.pipeline.figures.sheet import DASHES, INK, LIGHT, MARKERS, Figure, Sheet, legend_columns, legend_label

Points = Sequence[tuple[float, float]]

_MOST_POINTS = 300
_CURVE_HEIGHT = 170.0


def curve_figure(
    name: str,
    title: str,
    series: Mapping[str, Points],
    *,
    x_label: str,
    y_label: str,
    caption: str,
    is_log: bool = False,
    levels: Mapping[str, float] | None = None,
) -> Figure:
    """Draw values over steps or epochs, one line a series.

    Args:
        name: Of the figure's files.
        title: What it shows.
        series: The points of each line, x ascending, by its name.
        x_label: With its unit.
        y_label: With its unit.
        caption: How to read it.
        is_log: Whether the vertical axis is logarithmic.
        levels: Horizontal lines to hold the curves against, by name.
    """
    levels = levels or {}
    per_row = legend_columns(series)
    rows = math.ceil(len(series) / per_row) if len(series) > 1 else 0
    sheet = Sheet(title, x_label=x_label, y_label=y_label, height=_CURVE_HEIGHT, legend_rows=rows)
    axes = sheet.axes
    handles = []
    for index, (label, points) in enumerate(series.items()):
        x, y = zip(*_thinned(points), strict=True)
        style = index % len(LIGHT)
        (line,) = axes.plot(
            x,
            y,
            color=LIGHT[style],
            linestyle=DASHES[style],
            marker=MARKERS[style],
            markevery=max(len(x) // 8, 1),
            label=legend_label(label),
        )
        handles.append(line)
    _draw_levels(axes, levels)
    if is_log:
        _log_axis(axes)
    elif axes.get_ylim()[0] > 0 and not levels:
        axes.margins(y=0.12)
    _step_ticks(axes, [x for points in series.values() for x, _ in points])
    if len(series) > 1:
        sheet.legend(handles, columns=per_row)
    ends = "; ".join(
        f"{label} from {_short(points[0][1])} to {_short(points[-1][1])}" for label, points in series.items()
    )
    held = "".join(f"; {label} at {_short(value)}" for label, value in levels.items())
    return sheet.finish(name, caption=caption, description=f"{y_label} over {x_label}: {ends}{held}.")


def _thinned(points: Points) -> list[tuple[float, float]]:
    """Return at most some hundred points: means over neighbours, where there are more."""
    size = math.ceil(len(points) / _MOST_POINTS)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(part[-1][0], math.fsum(y for _, y in part) / len(part)) for part in parts]


def _draw_levels(axes: Any, levels: Mapping[str, float]) -> None:
    """Draw lines across, each with its name and value at one of the ends."""
    drawn = sorted(levels.items(), key=lambda level: level[1])
    for index, (label, value) in enumerate(drawn):
        dash = (0, (1, 2)) if label == "teacher" else (0, (5, 3))
        axes.axhline(value, color=INK, linewidth=1.1, alpha=0.75, linestyle=dash)
        is_lowest = index == 0 and len(drawn) > 1
        axes.annotate(
            f"{label} {_short(value)}",
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, -3 if is_lowest else 3),
            textcoords="offset points",
            ha="right",
            va="top" if is_lowest else "bottom",
            fontsize=9.5,
        )
    if drawn:
        axes.margins(y=0.14)


def spectrum_figure(name: str, title: str, spectra: Mapping[str, Sequence[float]], *, caption: str) -> Figure:
    """Draw the singular values of projectors, the largest first."""
    series = {
        label: [(index + 1.0, value) for index, value in enumerate(values) if value > 0]
        for label, values in spectra.items()
    }
    return curve_figure(
        name,
        title,
        series,
        x_label="index of the singular value",
        y_label="singular value (log axis)",
        caption=caption,
        is_log=True,
    )


def _log_axis(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    steps = (1.0,) if decades > 4 else (1.0, 3.0) if decades > 2 else (1.0, 2.0, 5.0) if decades > 0.7 else range(1, 10)
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _step_ticks(axes: Any, steps: Sequence[float]) -> None:
    """Label whole steps or epochs, and parts of them where there is no more than one."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    low, high = min(steps), max(steps)
    if low == high:
        axes.set_xlim(low - 0.5, high + 0.5)
    is_whole = high - low >= 2 or low == high
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=is_whole, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if is_whole else f"{value:.3g}"))


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
