"""Report a run or a sweep: one HTML page that opens without a network, and its figures as SVG and PNG files.

<output>/report/
    report.html         the page, with every figure in it
    figures/<name>.svg  text as text, for light and dark
    figures/<name>.png  on white
"""

import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from coldstill.cache.errors import ColdstillError
from coldstill.pipeline.figures.sheet import drawing_style
from coldstill.pipeline.judging.similarity import BlockSimilarity, block_similarity
from coldstill.pipeline.pages.blocks import layers_section, projectors_section, similarity_section
from coldstill.pipeline.pages.data import RunRecord, is_run, read_run
from coldstill.pipeline.pages.loss_curves import epochs_section, loss_section
from coldstill.pipeline.pages.page import Page, render
from coldstill.pipeline.pages.record import cost_section, record_section
from coldstill.pipeline.pages.recovery import recovery_section, recovery_tiles, run_subtitle
from coldstill.pipeline.pages.sweep import sweep_page
from coldstill.pipeline.pages.variants import first_complete
from coldstill.pipeline.runtime.errors import RecipeError
from coldstill.pipeline.runtime.whole import whole_file, write_whole
from coldstill.pipeline.stage_two.run_folder import folder_named
from coldstill.pipeline.sweeps.results import SweepResult, is_sweep, read_sweep

REPORT = "report"

_FIGURE_ID = re.compile(r'<figure id="figure-([\w-]+)">')


@dataclass(frozen=True)
class ReportSummary:
    """What was written.

    Attributes:
        page: The HTML file.
        figures: Names of the figures, each an SVG and a PNG file.
        missing: What the page says is missing, section by section.
    """

    page: str
    figures: list[str]
    missing: dict[str, list[str]]


def report(path: Path, *, output: Path | None = None, show_progress: bool = True) -> ReportSummary:
    """Write the report of a run or of a sweep.

    Args:
        path: Its folder, or a run's recipe.
        output: The folder of the report; `report` within the run's or the sweep's where it is None.
        show_progress: Whether to show a progress bar while blocks are compared.

    Raises:
        RecipeError: The folder holds neither a run nor a sweep, the run is not complete, or matplotlib is missing.
    """
    folder = folder_named(path)
    with drawing_style():
        if is_sweep(folder):
            sweep = read_sweep(folder)
            page = sweep_page(sweep, _similarities(sweep, show_progress=show_progress), footer=_footer())
        elif is_run(folder):
            page = _run_page(read_run(folder), show_progress=show_progress)
        else:
            raise RecipeError(
                f"{folder} holds neither a run nor a sweep; a run's folder is what its recipe names as `output`"
            )
    return _write(page, output.expanduser() if output else folder / REPORT)


def _run_page(run: RunRecord, *, show_progress: bool) -> Page:
    found = _similarity(run, "similarity", show_progress=show_progress)
    return Page(
        title=run.folder.resolve().name,
        subtitle=run_subtitle(run),
        tiles=recovery_tiles(run),
        sections=[
            recovery_section(run),
            loss_section(run),
            epochs_section(run),
            layers_section(run),
            similarity_section(run, found),
            projectors_section(run, found),
            cost_section(run),
            record_section(run),
        ],
        footer=_footer(),
    )


def _similarity(run: RunRecord, label: str, *, show_progress: bool) -> BlockSimilarity | str:
    """Compare a run's blocks with the teacher's; where that cannot be done, say why."""
    try:
        return block_similarity(run.recipe, run.layer_map, label=label, show_progress=show_progress)
    except ColdstillError as error:
        return str(error)


def _similarities(sweep: SweepResult, *, show_progress: bool) -> dict[str, BlockSimilarity | str]:
    """Compare the blocks of each variant's first complete run."""
    runs = {variant.name: run for variant in sweep.variants if (run := first_complete(variant)) is not None}
    return {
        name: _similarity(read_run(run.output), f"similarity of {name}", show_progress=show_progress)
        for name, run in runs.items()
    }


def _footer() -> str:
    return f"Written by coldstill {version('coldstill')}."


def _write(page: Page, output: Path) -> ReportSummary:
    """Write page and figures, and remove the figures of an earlier report that this one does not have."""
    file, folder = output / "report.html", output / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    names = [figure.name for figure in page.figures]
    earlier = _FIGURE_ID.findall(file.read_text(encoding="utf-8")) if file.is_file() else []
    for name in set(earlier) - set(names):
        for kind in ("svg", "png"):
            (folder / f"{name}.{kind}").unlink(missing_ok=True)
    for figure in page.figures:
        write_whole(folder / f"{figure.name}.svg", figure.svg)
        with whole_file(folder / f"{figure.name}.png") as partial:
            partial.write_bytes(figure.png)
    write_whole(file, render(page))
    return ReportSummary(str(file), names, page.missing)
