"""The drawing of a layer map: student blocks beside teacher blocks, with what was removed, and who learns from whom."""

from collections.abc import Mapping, Sequence
from typing import Any

from coldstill.pipeline.figures.sheet import INK, LIGHT, Figure, Sheet

_STUDENT, _TEACHER, _BOX = 0.0, 0.62, 0.38


def layer_map_figure(
    name: str,
    layer_map: Mapping[int, int],
    *,
    num_student_blocks: int,
    num_teacher_blocks: int,
    kept_blocks: Sequence[int] | None,
    caption: str,
) -> Figure:
    """Draw a line from each mapped student block to its teacher block.

    Args:
        name: Of the figure's files.
        layer_map: Student block to teacher block; may be empty.
        num_student_blocks: How many the student has.
        num_teacher_blocks: How many the teacher has.
        kept_blocks: The teacher block that each student block was cut from; None where it was not cut.
        caption: How to read it.
    """
    sheet = Sheet(
        "Layer map",
        x_label="model",
        y_label="decoder block, the first at the bottom",
        height=max(num_teacher_blocks * 15.0, 60.0),
    )
    axes = sheet.axes
    axes.grid(visible=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_xlim(-0.005, 1.005)
    axes.set_ylim(-0.6, num_teacher_blocks - 0.4)
    axes.set_yticks([])
    axes.set_xticks([_STUDENT + _BOX / 2, _TEACHER + _BOX / 2], ["student", "teacher"])
    axes.tick_params(length=0)
    rows = _student_rows(num_student_blocks, num_teacher_blocks, kept_blocks)
    gone = set() if kept_blocks is None else set(range(num_teacher_blocks)) - set(kept_blocks)
    for block in range(num_teacher_blocks):
        words = f"{block} removed" if block in gone else str(block)
        _box(axes, _TEACHER, block, words, is_gone=block in gone, colour=INK)
    for block, row in enumerate(rows):
        _box(axes, _STUDENT, row, str(block), is_gone=False, colour=LIGHT[0] if block in layer_map else INK)
    for student, teacher in layer_map.items():
        ends = (_STUDENT + _BOX, _TEACHER)
        axes.plot(ends, (rows[student], teacher), color=LIGHT[0], marker="o", markersize=3, linewidth=1.4)
    lines = ", ".join(f"{student} to {teacher}" for student, teacher in layer_map.items()) or "none"
    removed = f" Removed teacher blocks: {', '.join(map(str, sorted(gone)))}." if gone else ""
    description = (
        f"{num_student_blocks} student blocks and {num_teacher_blocks} teacher blocks. Mapped pairs: {lines}.{removed}"
    )
    return sheet.finish(name, caption=caption, description=description)


def _student_rows(num_student: int, num_teacher: int, kept_blocks: Sequence[int] | None) -> list[float]:
    """Return the height of each student block: that of the block that it was cut from, or evenly spread."""
    if kept_blocks is not None:
        return [float(block) for block in kept_blocks]
    if num_student == 1:
        return [(num_teacher - 1) / 2]
    return [block * (num_teacher - 1) / (num_student - 1) for block in range(num_student)]


def _box(axes: Any, left: float, row: float, words: str, *, is_gone: bool, colour: str) -> None:
    from matplotlib.patches import Rectangle

    frame = Rectangle(
        (left, row - 0.4),
        _BOX,
        0.8,
        facecolor="none" if is_gone else (*_rgb(colour), 0.1),
        edgecolor=colour,
        linewidth=0.9,
        linestyle=(0, (3, 2)) if is_gone else "-",
        clip_on=False,
    )
    axes.add_patch(frame)
    axes.text(left + _BOX / 2, row, words, ha="center", va="center_baseline", fontsize=9.5, alpha=0.8 if is_gone else 1)


def _rgb(colour: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(colour)
