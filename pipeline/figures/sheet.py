"""What all figures share: a sheet with title, axes and labels, its colours, and how it becomes SVG and PNG.

A sheet is as wide as a phone's screen, in CSS pixels, so that its words can be read there. Foreground and series
colours are those of a light page; in SVG they become `currentColor` and CSS variables, which a dark page sets anew.
"""

import contextlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coldstill.pipeline.figures.svg import ROLE, page_svg
from coldstill.pipeline.runtime.errors import RecipeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

WIDTH = 340
INK = "#1f2328"
LIGHT = ("#0069b4", "#c8500a", "#00855f", "#a8488a", "#8f6a00", "#5b5bd6", "#5c6670", "#b3261e")
DARK = ("#58b0f2", "#ff9257", "#35c79c", "#e69bcb", "#e3b341", "#a5a5ff", "#a7b1bb", "#ff8f86")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
DASHES: tuple[Any, ...] = (
    "-",
    (0, (6, 2)),
    (0, (2, 1.5)),
    (0, (7, 2, 2, 2)),
    (0, (1, 1.5)),
    (0, (4, 1, 1, 1, 1, 1)),
    (0, (9, 3)),
    (0, (3, 3)),
)

_TEXT = 10.5
_PNG_SCALE = 3
# Of a legend's entry: its line with the space around it, and a character of its words.
_HANDLE, _CHAR = 46.0, 6.4
_TOP, _LINE, _GAP, _RIGHT, _BOTTOM = 6.0, 16.0, 5.0, 10.0, 38.0
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": _TEXT,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.14,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "coldstill",
    "text.parse_math": False,
    # A power of ten set apart from the labels would fall on other words.
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-9, 12),
}


@dataclass(frozen=True)
class Figure:
    """A drawing with its words.

    Attributes:
        name: What its files are called.
        title: What it shows.
        caption: One sentence that says how to read it.
        description: What a reader who does not see it should know.
        inline_svg: For a page that sets the colours.
        svg: A file that stands alone, light or dark.
        png: The same on white.
    """

    name: str
    title: str
    caption: str
    description: str
    inline_svg: str
    svg: str
    png: bytes


def palette_css(colours: Sequence[str]) -> str:
    """Return the CSS variables of the series' colours."""
    return " ".join(f"--series-{index}: {colour};" for index, colour in enumerate(colours))


@contextlib.contextmanager
def drawing_style() -> Iterator[None]:
    """Let what is drawn inside look as figures here do, whatever style the user has set for matplotlib.

    Raises:
        RecipeError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise RecipeError("a report needs matplotlib; run: pip install 'coldstill[report]'") from None
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def legend_columns(labels: Iterable[str]) -> int:
    """Say how many entries of a legend fit beside one another."""
    widest = max(len(legend_label(label)) for label in labels)
    return int(max(1, min(3, WIDTH // (_HANDLE + _CHAR * widest))))


def legend_label(label: str) -> str:
    """Cut what is too long for a line of a legend."""
    most = int((WIDTH - _HANDLE) / _CHAR)
    return label if len(label) <= most else label[: most - 1] + "…"


class Sheet:
    """A figure in the making, inside `drawing_style`: title, vertical label, legend and axes, in CSS pixels.

    Args:
        title: What it shows; one line.
        x_label: With its unit.
        y_label: With its unit; it stands above the axes, where words are read.
        height: Of the axes.
        legend_rows: Lines to leave for a legend.

    """

    def __init__(self, title: str, *, x_label: str, y_label: str, height: float, legend_rows: int = 0) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Drawing

        self.title = title
        self._top = _TOP + _LINE * (2 + legend_rows) + (_GAP if legend_rows else 0)
        total = self._top + height + _BOTTOM
        self._drawing = Drawing(figsize=(WIDTH / 72, total / 72), dpi=72)
        FigureCanvasAgg(self._drawing)
        self._total, self._height = total, height
        self._bar: Axes | None = None
        self.axes: Axes = self._drawing.add_axes((0.1, _BOTTOM / total, 0.8, height / total))
        self._write(0, _TOP + 10, title, role="title", fontweight="bold", fontsize=12)
        self._write(0, _TOP + _LINE + 10, y_label, role="y-label", alpha=0.8)
        self.axes.set_xlabel(x_label, labelpad=4).set_gid(f"{ROLE}x-label")

    def legend(self, handles: Sequence[Any], *, columns: int) -> None:
        """Lay a legend between the vertical label and the axes."""
        self._drawing.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(0, 1 - (_TOP + _LINE * 2 + _GAP - 2) / self._total),
            ncol=columns,
            borderpad=0,
            borderaxespad=0,
            handlelength=2.4,
            handletextpad=0.5,
            columnspacing=1.2,
            labelspacing=0.45,
        )

    def colour_bar(self, shown: Any) -> None:
        """Say beside the axes what the colours of an image mean."""
        lowest, highest = shown.get_clim()
        steps = [[lowest + (highest - lowest) * index / 127] for index in range(128)]
        self._bar = self._drawing.add_axes((0, 0, 1, 1))
        self._bar.imshow(
            steps,
            cmap=shown.get_cmap(),
            aspect="auto",
            origin="lower",
            interpolation="none",
            extent=(0, 1, lowest, highest),
        )
        self._bar.grid(visible=False)
        self._bar.set_xticks([])
        self._bar.yaxis.tick_right()
        self._bar.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        self._bar.locator_params(axis="y", nbins=5)

    def finish(self, name: str, *, caption: str, description: str) -> Figure:
        """Make room for the tick labels, and return the figure."""
        self._fit()
        svg, png = io.StringIO(), io.BytesIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        self._drawing.savefig(svg, format="svg", transparent=True, metadata=metadata)
        self._drawing.savefig(png, format="png", facecolor="white", dpi=72 * _PNG_SCALE, metadata={"Software": None})
        words = {"name": name, "title": self.title, "description": description}
        drawn = svg.getvalue()
        return Figure(
            **words,
            caption=caption,
            inline_svg=page_svg(drawn, **words, colours=_SHOWN),
            svg=page_svg(drawn, **words, colours=_SHOWN, inline_style=_FILE_STYLE) + "\n",
            png=png.getvalue(),
        )

    def _write(self, x: float, y: float, text: str, *, role: str, **style: Any) -> "Text":
        written = self._drawing.text(x / WIDTH, 1 - y / self._total, text, va="baseline", **style)
        written.set_gid(f"{ROLE}{role}")
        return written

    def _fit(self) -> None:
        """Let the axes begin where the widest tick label ends."""
        renderer = self._drawing.canvas.get_renderer()  # type: ignore[attr-defined]
        self._drawing.draw_without_rendering()
        labels = [label for label in self.axes.get_yticklabels() if label.get_text()]
        widest = max((label.get_window_extent(renderer).width for label in labels), default=0.0)
        last = [label for label in self.axes.get_xticklabels() if label.get_text()]
        overhang = max((label.get_window_extent(renderer).width / 2 for label in last), default=0.0)
        left, right = widest + 7, max(_RIGHT, overhang + 2)
        if self._bar is not None:
            right = 58.0
            self._bar.set_position(self._place(WIDTH - right + 10, 10))
        self.axes.set_position(self._place(left, WIDTH - left - right))

    def _place(self, left: float, width: float) -> tuple[float, float, float, float]:
        return left / WIDTH, _BOTTOM / self._total, width / WIDTH, self._height / self._total


_SHOWN = {INK: "currentColor", **{colour: f"var(--series-{index})" for index, colour in enumerate(LIGHT)}}
_FILE_STYLE = (
    f":root {{ color-scheme: light dark; color: {INK}; {palette_css(LIGHT)} }} "
    f"@media (prefers-color-scheme: dark) {{ :root {{ color: #e6edf3; {palette_css(DARK)} }} }}"
)
