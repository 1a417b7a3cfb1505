"""Figures of blocks: how alike student and teacher blocks are, and each mapped pair's values. From plain data."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from coldstill.pipeline.figures.sheet import INK, LIGHT, MARKERS, Figure, Sheet


def heatmap_figure(
    name: str,
    title: str,
    values: Sequence[Sequence[float]],
    *,
    columns: Sequence[int],
    pairs: Mapping[int, int],
    unit: str,
    limits: tuple[float, float],
    caption: str,
) -> Figure:
    """Draw how alike student blocks, upwards, and teacher blocks, to the right, are; mapped pairs carry a ring.

    Args:
        name: Of the figure's files.
        title: What it shows.
        values: A row for each student block.
        columns: The teacher's blocks.
        pairs: Student block to teacher block.
        unit: What the colours measure.
        limits: Where the colours begin and end.
        caption: How to read it.
    """
    height = min(max(len(values) * 18.0, 120.0), 320.0)
    sheet = Sheet(title, x_label="teacher block", y_label=f"student block; colour: {unit}", height=height)
    axes = sheet.axes
    axes.grid(visible=False)
    shown = axes.imshow(values, cmap="viridis", clim=limits, aspect="auto", origin="lower", interpolation="none")
    _block_ticks(axes.xaxis, columns, most=12)
    _block_ticks(axes.yaxis, range(len(values)), most=16)
    marked = [(columns.index(teacher), student) for student, teacher in pairs.items() if teacher in columns]
    for colour, width in (("#ffffff", 2.6), ("#101010", 1.0)):
        if marked:
            x, y = zip(*marked, strict=True)
            axes.plot(x, y, "o", markersize=6, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=width)
    sheet.colour_bar(shown)
    near = [max(range(len(columns)), key=row.__getitem__) for row in values]
    diagonal = ", ".join(f"{student} nearest to {columns[teacher]}" for student, teacher in enumerate(near))
    return sheet.finish(name, caption=caption, description=f"{unit} of each pair of blocks; student block {diagonal}.")


def pairs_figure(
    name: str,
    title: str,
    pairs: Sequence[tuple[str, Mapping[str, float]]],
    *,
    x_label: str,
    caption: str,
) -> Figure:
    """Draw, for each mapped pair from the first block up, a mark for each of its values, joined by a line.

    Args:
        name: Of the figure's files.
        title: What it shows.
        pairs: Of each pair its name and its values by what they are of.
        x_label: With its unit.
        caption: How to read it.
    """
    kinds = list(dict.fromkeys(kind for _, values in pairs for kind in values))
    height = max(len(pairs) * 17.0, 60.0)
    y_label = "student block to teacher block"
    sheet = Sheet(title, x_label=x_label, y_label=y_label, height=height, legend_rows=len(kinds))
    axes = sheet.axes
    axes.grid(visible=False, axis="y")
    for row, (_, values) in enumerate(pairs):
        axes.plot([min(values.values()), max(values.values())], [row, row], color=INK, alpha=0.35, linewidth=1.2)
    handles = []
    for index, kind in enumerate(kinds):
        points = [(values[kind], row) for row, (_, values) in enumerate(pairs) if kind in values]
        x, y = zip(*points, strict=True)
        face = "none" if index == 0 and len(kinds) > 1 else LIGHT[index]
        (marks,) = axes.plot(
            x, y, MARKERS[index], color=LIGHT[index], markerfacecolor=face, markersize=6, label=kind, linestyle="none"
        )
        handles.append(marks)
    axes.set_yticks(range(len(pairs)), [label for label, _ in pairs])
    axes.set_ylim(-0.7, len(pairs) - 0.3)
    axes.margins(x=0.08)
    sheet.legend(handles, columns=1)
    said = "; ".join(
        f"{label}: " + ", ".join(f"{kind} {value:.3f}" for kind, value in values.items()) for label, values in pairs
    )
    return sheet.finish(name, caption=caption, description=f"{x_label}. {said}.")


def _block_ticks(axis: Any, blocks: Sequence[int], *, most: int) -> None:
    """Label every n-th block."""
    step = math.ceil(len(blocks) / most)
    axis.set_ticks(range(0, len(blocks), step), [str(blocks[index]) for index in range(0, len(blocks), step)])
