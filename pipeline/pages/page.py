"""A report as one HTML page that needs nothing else: sections of words, tables and figures, and how they are laid out.

Knows figures and text; knows nothing of runs or sweeps. The layout is in `report.html.jinja` and `report.css`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import ClassVar

from coldstill.pipeline.figures.sheet import DARK, LIGHT, Figure, palette_css


@dataclass(frozen=True)
class Words:
    """A paragraph."""

    text: str
    kind: ClassVar[str] = "words"


@dataclass(frozen=True)
class Missing:
    """Why something is not there, and how to get it."""

    text: str
    kind: ClassVar[str] = "missing"


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows.

    Attributes:
        caption: How to read it.
        headings: Of every column, with units.
        rows: A text for each column.
        word_columns: Columns that hold words; the others hold figures.
        strong: Row and column of the cells to stress.
    """

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    word_columns: frozenset[int] = frozenset({0})
    strong: frozenset[tuple[int, int]] = frozenset()
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Figures:
    """Figures side by side, as many as there is room for."""

    figures: Sequence[Figure]
    kind: ClassVar[str] = "figures"


@dataclass(frozen=True)
class Code:
    """Text as it stands in a file."""

    name: str
    text: str
    kind: ClassVar[str] = "code"


@dataclass(frozen=True)
class Beside:
    """Blocks that stand side by side where there is room."""

    blocks: "Sequence[Block]"
    kind: ClassVar[str] = "beside"


@dataclass(frozen=True)
class Folded:
    """What is shown when it is asked for."""

    summary: str
    blocks: "Sequence[Block]"
    kind: ClassVar[str] = "folded"


Block = Words | Missing | Table | Figures | Code | Beside | Folded


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading; `name` is its anchor."""

    name: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Tile:
    """A figure to see first: what it is of, its value, and what to hold it against."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    subtitle: str
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    footer: str

    @property
    def figures(self) -> list[Figure]:
        """Every figure, in the page's order."""
        blocks = [block for section in self.sections for block in _unfolded(section.blocks)]
        return [figure for block in blocks if isinstance(block, Figures) for figure in block.figures]

    @property
    def missing(self) -> dict[str, list[str]]:
        """What is said to be missing, by section."""
        found: dict[str, list[str]] = {}
        for section in self.sections:
            for block in _unfolded(section.blocks):
                if isinstance(block, Missing):
                    found.setdefault(section.name, []).append(block.text)
        return found


def render(page: Page) -> str:
    """Return the page as HTML."""
    from jinja2 import Environment, StrictUndefined

    folder = files("coldstill.pipeline.pages")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(folder.joinpath("report.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        page=page,
        style=folder.joinpath("report.css").read_text(encoding="utf-8"),
        light=palette_css(LIGHT),
        dark=palette_css(DARK),
    )


def _unfolded(blocks: Sequence[Block]) -> list[Block]:
    """Return blocks, and behind each those that it holds."""
    found: list[Block] = []
    for block in blocks:
        found.append(block)
        if isinstance(block, Beside | Folded):
            found += _unfolded(block.blocks)
    return found
