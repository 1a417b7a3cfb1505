"""A run's and a sweep's report in a real headless Chromium: on a phone and a desktop, light and dark."""

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Tab, open_browser
from sweep_folder import write_sweep_folder

from coldstill.pipeline.report import ReportSummary, report

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and os.environ.get("COLDSTILL_TEST_BROWSER") != "required",
    reason="no chromium or chrome on this machine: install one to check how reports look",
)

REPORTS = ("run", "sweep")
SCREENS = [(width, scheme) for width in (375, 1280) for scheme in ("light", "dark")]
# Everything that folds is opened first, so that it is held to the same rules.
LOOK = """(() => {
  document.querySelectorAll("details").forEach((folded) => { folded.open = true; });
  const page = document.documentElement;
  const box = (element) => {
    const { left, right, top, bottom, width, height } = element.getBoundingClientRect();
    return { left, right, top, bottom, width, height };
  };
  const ink = getComputedStyle(document.body).color;
  return {
    scrollWidth: page.scrollWidth,
    clientWidth: page.clientWidth,
    ground: getComputedStyle(document.body).backgroundColor,
    ink,
    ids: [...document.querySelectorAll("[id]")].map((element) => element.id),
    outside: [...document.querySelectorAll("h1, h2, h3, p, figcaption, summary, a, dt, dd")]
      .filter((element) => !element.closest(".table") && box(element).right > page.clientWidth + 0.5)
      .map((element) => element.textContent.slice(0, 60)),
    figures: [...document.querySelectorAll("figure")].map((figure) => {
      const svg = figure.querySelector("svg");
      return {
        name: figure.id.replace("figure-", ""),
        box: box(svg),
        label: svg.getAttribute("aria-label"),
        caption: figure.querySelector("figcaption").textContent.trim(),
        titles: ["title", "x-label", "y-label"].map((role) => svg.querySelector(`.role-${role}`)?.textContent.trim()),
        marks: svg.querySelectorAll("path, use, image, rect").length,
        strays: [...svg.querySelectorAll("[href]")]
          .map((element) => element.getAttribute("href"))
          .filter((target) => target.startsWith("#") && !svg.querySelector(target)),
        texts: [...svg.querySelectorAll("text")].map((text) => ({
          text: text.textContent, box: box(text), inked: getComputedStyle(text).fill === ink,
          size: parseFloat(getComputedStyle(text).fontSize) * box(svg).width / svg.viewBox.baseVal.width,
        })),
      };
    }),
  };
})()"""


@pytest.fixture(scope="module")
def reports(whole_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ReportSummary]:
    sweep = tmp_path_factory.mktemp("sweep")
    write_sweep_folder(sweep, whole_run)
    run = report(whole_run, output=tmp_path_factory.mktemp("run"), show_progress=False)
    return {"run": run, "sweep": report(sweep)}


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def look(tab: Tab, reports: dict[str, ReportSummary]) -> Callable[..., dict[str, Any]]:
    """Open a report once on each screen, and say what is seen of it, complained of and asked for."""

    @functools.cache
    def seen(name: str, width: int, scheme: str) -> dict[str, Any]:
        tab.open(Path(reports[name].page), width=width, scheme=scheme)
        found = tab.evaluate(LOOK)
        return {**found, "complaints": tab.complaints, "requests": tab.requests}

    return seen


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
@pytest.mark.parametrize("name", REPORTS)
def test_the_page_complains_of_nothing_and_asks_for_nothing_but_itself(
    look: Callable[..., dict[str, Any]], reports: dict[str, ReportSummary], name: str, width: int, scheme: str
):
    seen = look(name, width, scheme)
    assert seen["complaints"] == []
    asked = [url for url in seen["requests"] if not url.startswith("data:")]
    assert asked == [Path(reports[name].page).resolve().as_uri()]


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
@pytest.mark.parametrize("name", REPORTS)
def test_nothing_is_wider_than_the_screen(look: Callable[..., dict[str, Any]], name: str, width: int, scheme: str):
    seen = look(name, width, scheme)
    assert seen["scrollWidth"] <= seen["clientWidth"] <= width
    assert seen["outside"] == []


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
@pytest.mark.parametrize("name", REPORTS)
def test_every_figure_is_there_labelled_and_readable(
    look: Callable[..., dict[str, Any]], reports: dict[str, ReportSummary], name: str, width: int, scheme: str
):
    seen = look(name, width, scheme)
    assert [figure["name"] for figure in seen["figures"]] == reports[name].figures
    for figure in seen["figures"]:
        frame = figure["box"]
        assert frame["width"] >= 300, figure["name"]
        assert frame["height"] >= 100, figure["name"]
        assert frame["right"] <= seen["clientWidth"], figure["name"]
        assert all(figure["titles"]), figure["name"]
        assert figure["titles"][0] in figure["label"], figure["name"]
        assert figure["caption"].endswith("."), figure["name"]
        assert figure["marks"] > 5, figure["name"]
        assert figure["strays"] == [], figure["name"]
        assert [problem for text in figure["texts"] for problem in problems(text, frame)] == [], figure["name"]
        assert overlaps(figure["texts"]) == [], figure["name"]


def problems(text: dict[str, Any], frame: dict[str, float]) -> Iterator[str]:
    """Say what keeps a text of a figure from being read."""
    box = text["box"]
    if not text["text"].strip() or box["width"] <= 0:
        yield f"empty text {text}"
    if box["left"] < frame["left"] - 1 or box["right"] > frame["right"] + 1:
        yield f"{text['text']} is cut off at a side"
    if box["top"] < frame["top"] - 1 or box["bottom"] > frame["bottom"] + 1:
        yield f"{text['text']} is cut off above or below"
    if text["size"] < 8.5:
        yield f"{text['text']} is {text['size']:.1f} px large"
    if not text["inked"]:
        yield f"{text['text']} does not have the page's colour"


def overlaps(texts: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Name the pairs of texts that share more than a quarter of the smaller one's box."""
    found = []
    for index, one in enumerate(texts):
        for other in texts[index + 1 :]:
            a, b = one["box"], other["box"]
            width = min(a["right"], b["right"]) - max(a["left"], b["left"])
            height = min(a["bottom"], b["bottom"]) - max(a["top"], b["top"])
            smaller = min(a["width"] * a["height"], b["width"] * b["height"])
            # Boxes hold the room above and below letters, so that two lines of one label touch.
            if width > 1 and height > 3 and width * height > 0.25 * smaller:
                found.append((one["text"], other["text"]))
    return found


def test_light_and_dark_have_their_own_colours_with_enough_contrast(tab: Tab, reports: dict[str, ReportSummary]):
    grounds = set()
    for scheme in ("light", "dark"):
        tab.open(Path(reports["run"].page), width=375, scheme=scheme)
        seen = tab.evaluate(LOOK)
        grounds.add(seen["ground"])
        assert contrast(seen["ground"], seen["ink"]) >= 7
        series = tab.evaluate(
            "[...Array(8).keys()].map((index) => { const probe = document.createElement('i');"
            " probe.style.color = `var(--series-${index})`; document.body.append(probe);"
            " return getComputedStyle(probe).color; })"
        )
        assert len(set(series)) == 8
        assert [colour for colour in series if contrast(seen["ground"], colour) < 3] == []
    assert len(grounds) == 2


def contrast(one: str, other: str) -> float:
    """Give the contrast ratio of WCAG 2 of two colours, `rgb(r, g, b)`."""
    first, second = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (first + 0.05) / (second + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(value) / 255 for value in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("name", REPORTS)
def test_no_id_occurs_twice(look: Callable[..., dict[str, Any]], name: str):
    ids = look(name, 1280, "light")["ids"]
    assert sorted(ids) == sorted(set(ids))


def test_a_figures_own_file_opens_alone(tab: Tab, reports: dict[str, ReportSummary]):
    for name in reports["run"].figures:
        tab.open(Path(reports["run"].page).parent / "figures" / f"{name}.svg", width=375, scheme="dark")
        assert tab.evaluate("document.querySelector('.role-title').textContent").strip(), name
        assert tab.complaints == [], name
    assert tab.screenshot().startswith(b"\x89PNG")


def test_the_fixtures_show_what_reports_must_be_able_to_show(reports: dict[str, ReportSummary]):
    blocks = {"similarity-before", "similarity-after", "projector-spectrum", "pairs-cosine", "layer-map"}
    assert blocks <= set(reports["run"].figures)
    compared = {"variants-perplexity", "variants-kl", "variants-agreement", "nearest-blocks-cka"}
    assert compared <= set(reports["sweep"].figures)
