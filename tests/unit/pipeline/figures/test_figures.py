"""Figures from plain data: what their files must be, whatever they show."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from coldstill.pipeline.figures.curves import curve_figure
from coldstill.pipeline.figures.dots import DotRow, dots_figure
from coldstill.pipeline.figures.layers import layer_map_figure
from coldstill.pipeline.figures.sheet import INK, LIGHT, Figure, drawing_style


def curve(name: str = "loss") -> Figure:
    series = {"a": [(1.0, 3.0), (2.0, 2.0)], "b": [(1.0, 4.0), (2.0, 1.0)]}
    with drawing_style():
        return curve_figure(name, "Loss", series, x_label="step", y_label="nats a token", caption="Read it.")


def texts(figure: Figure) -> list[str]:
    return [element.text or "" for element in ET.fromstring(figure.svg).iter() if element.tag.endswith("text")]


def dots(*rows: DotRow, levels: dict[str, float]) -> Figure:
    with drawing_style():
        return dots_figure("kl", "KL", rows, x_label="KL (nats)", levels=levels, caption="Read it.")


def test_the_same_data_make_the_same_bytes():
    one, other = curve(), curve()
    assert (one.svg, one.inline_svg, one.png) == (other.svg, other.inline_svg, other.png)


def test_a_page_decides_every_colour_of_an_inline_figure():
    inline = curve().inline_svg
    assert not re.findall("|".join([INK, *LIGHT, "#000000", "#ffffff"]), inline)
    assert "currentColor" in inline
    assert "var(--series-1)" in inline


def test_two_figures_on_one_page_share_no_id():
    ids = [set(re.findall(r' id="([^"]+)"', curve(name).inline_svg)) for name in ("one", "other")]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_words_stay_words_and_a_reader_without_eyes_has_them_too():
    figure = curve()
    assert {"Loss", "step", "nats a token", "a", "b"} <= set(texts(figure))
    root = ET.fromstring(figure.svg)
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"] == f"Loss. {figure.description}"
    assert "a from 3 to 2" in figure.description


def test_a_level_far_from_all_dots_is_named_instead_of_pressing_them_together():
    rows = [DotRow("one", 36.1, 0.2, [36.0, 36.2]), DotRow("other", 36.4)]
    figure = dots(*rows, levels={"teacher": 36.9, "pruned": 1234.0})
    assert "teacher" in texts(figure)
    assert "pruned" not in texts(figure)
    assert figure.caption == "Read it. Off the scale: pruned 1234."


def test_a_variant_without_a_number_has_a_row_that_says_why():
    figure = dots(DotRow("good", 0.3), DotRow("broken", None, status="failed"), DotRow("exploded", math.inf), levels={})
    assert {"good", "broken", "(failed)", "exploded", "(inf)"} <= set(texts(figure))
    assert "broken: failed" in figure.description


@pytest.mark.parametrize(
    ("points", "labels"),
    [
        ([(1.0, 30.5)], ["1"]),
        ([(0.25, 30.5), (0.5, 20.5)], ["0.25", "0.5"]),
        ([(1.0, math.inf), (2.0, 30.5), (3.0, 20.5)], ["2", "3"]),
    ],
    ids=["one", "parts", "infinite"],
)
def test_one_epoch_parts_of_epochs_and_infinite_values_can_be_drawn(
    points: list[tuple[float, float]], labels: list[str]
):
    with drawing_style():
        figure = curve_figure("few", "Few", {"a": points}, x_label="epoch", y_label="perplexity", caption="Read it.")
    assert [texts(figure).count(label) for label in labels] == [1] * len(labels)


def test_thousands_of_steps_are_drawn_as_means_over_neighbours():
    points = [(float(step), 1.0 if step % 2 else 3.0) for step in range(6000)]
    with drawing_style():
        figure = curve_figure("long", "Long", {"a": points}, x_label="step", y_label="loss", caption="Read it.")
    assert len(figure.svg) < 40_000


def test_removed_blocks_and_every_pair_are_in_a_layer_map():
    with drawing_style():
        figure = layer_map_figure(
            "map", {0: 0, 1: 3}, num_student_blocks=2, num_teacher_blocks=4, kept_blocks=[0, 3], caption="Read it."
        )
    assert {"1 removed", "2 removed"} <= set(texts(figure))
    assert figure.description.endswith("Mapped pairs: 0 to 0, 1 to 3. Removed teacher blocks: 1, 2.")
