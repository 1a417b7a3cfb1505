"""The report of a sweep: its variants side by side, with error bars, their training, their cost, what failed."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from coldstill.pipeline.figures.dots import DotRow, dots_figure
from coldstill.pipeline.figures.sheet import Figure
from coldstill.pipeline.pages.numbers import MEASURES, heading, list_words, percent, show_measure
from coldstill.pipeline.pages.page import Block, Figures, Missing, Page, Section, Table, Tile
from coldstill.pipeline.pages.variants import nearest_blocks_section, training_section, variants_section
from coldstill.pipeline.runtime.units import format_duration, format_size
from coldstill.pipeline.sweeps.results import (
    RETENTION,
    SECONDS_PER_POINT,
    TASK_AVERAGE,
    Spread,
    SweepResult,
    VariantResult,
    before_training,
    measures_of,
)

if TYPE_CHECKING:
    from coldstill.pipeline.judging.similarity import BlockSimilarity

_Show = Callable[[float], str]

# Of each measure: its heading, how a value is written, and whether less is better.
_QUALITIES: dict[str, tuple[str, _Show, bool]] = {
    "perplexity": (heading("perplexity"), lambda value: show_measure("perplexity", value), True),
    "kl": (heading("kl"), lambda value: show_measure("kl", value), True),
    "agreement": (heading("agreement"), percent, False),
    RETENTION: ("retention, average over tasks (%)", percent, False),
    TASK_AVERAGE: ("task score, average (%)", percent, False),
}
_COSTS: dict[str, tuple[str, _Show, bool]] = {
    "seconds": ("training", format_duration, True),
    "peak_memory_bytes": ("peak memory", format_size, True),
    SECONDS_PER_POINT: ("seconds of training a point", lambda value: f"{value:,.1f}", True),
}
_SHARES = ("agreement", RETENTION, TASK_AVERAGE)


def sweep_page(sweep: SweepResult, similarities: "Mapping[str, BlockSimilarity | str]", *, footer: str) -> Page:
    """Return the whole report of a sweep, given how alike the blocks of each variant and of the teacher are."""
    runs = [run for variant in sweep.variants for run in variant.runs]
    counts = {status: sum(run.status == status for run in runs) for status in ("complete", "failed", "pending")}
    said = list_words([f"{count} {status}" for status, count in counts.items() if count])
    return Page(
        title=sweep.name,
        subtitle=f"A sweep of {len(sweep.variants)} variants, {len(runs)} runs: {said}.",
        tiles=_tiles(sweep),
        sections=[
            _comparison(sweep),
            training_section(sweep),
            nearest_blocks_section(similarities),
            _cost(sweep),
            variants_section(sweep),
        ],
        footer=footer,
    )


def _tiles(sweep: SweepResult) -> list[Tile]:
    tiles = []
    for measure, words in (
        ("perplexity", "lowest perplexity"),
        ("kl", "lowest KL to teacher"),
        ("agreement", "highest agreement"),
        (RETENTION, "highest retention"),
    ):
        best = _best(sweep, measure)
        if best is not None:
            _, show, _ = _QUALITIES[measure]
            tiles.append(Tile(words, show(best.measures[measure].mean), best.name))
    return tiles


def _best(sweep: SweepResult, measure: str) -> VariantResult | None:
    _, _, less_is_better = (_QUALITIES | _COSTS)[measure]
    judged = [variant for variant in sweep.variants if measure in variant.measures]
    if not judged:
        return None
    return (min if less_is_better else max)(judged, key=lambda variant: variant.measures[measure].mean)


def _comparison(sweep: SweepResult) -> Section:
    measures = {name: parts for name, parts in _QUALITIES.items() if _best(sweep, name) is not None}
    if not measures:
        blocks: list[Block] = [Missing("No run is complete and judged yet; run: coldstill ablate"), *_failures(sweep)]
        return Section("comparison", "Comparison", blocks)
    caption = (
        "Recovered students on held-out text, mean ± standard deviation over seeds; the best mean of a column is bold, "
        "which says nothing where deviations overlap."
    )
    blocks = [_table(sweep, measures, caption, with_models=True)]
    blocks.append(Figures([_dots(sweep, measure) for measure in measures]))
    if RETENTION not in measures:
        blocks.append(Missing("No benchmark tasks; name some in evaluate.tasks, and run: coldstill ablate"))
    return Section("comparison", "Comparison", [*blocks, *_failures(sweep)])


def _table(
    sweep: SweepResult, measures: Mapping[str, tuple[str, _Show, bool]], caption: str, *, with_models: bool
) -> Table:
    rows, strong = [], set[tuple[int, int]]()
    if with_models:
        for name, figures in before_training(sweep).items():
            cells = [show(figures[key]) if key in figures else "-" for key, (_, show, _) in measures.items()]
            rows.append([name, *cells, ""])
    for variant in sweep.variants:
        num_complete = sum(run.status == "complete" for run in variant.runs)
        cells = [_spread(variant.measures.get(name), show) for name, (_, show, _) in measures.items()]
        if not num_complete:
            cells[0] = _status(variant)
        strong |= {
            (len(rows), column + 1)
            for column, name in enumerate(measures)
            if _best(sweep, name) is variant and len(sweep.variants) > 1
        }
        rows.append([variant.name, *cells, f"{num_complete} of {len(variant.runs)}"])
    headings = ["variant", *(words for words, _, _ in measures.values()), "complete runs"]
    return Table(caption, headings, rows, strong=frozenset(strong))


def _spread(spread: Spread | None, show: _Show) -> str:
    if spread is None:
        return "-"
    return show(spread.mean) if spread.deviation is None else f"{show(spread.mean)} ± {show(spread.deviation)}"


def _status(variant: VariantResult) -> str:
    return "failed" if any(run.status == "failed" for run in variant.runs) else "pending"


def _dots(sweep: SweepResult, measure: str) -> Figure:
    scale = 100.0 if measure in _SHARES else 1.0
    has_many_students = len(sweep.pruned) > 1
    rows = []
    for variant in sweep.variants:
        spread = variant.measures.get(measure)
        judged = [run.evaluation for run in variant.runs if run.evaluation is not None]
        found = [measures_of(evaluation, "recovered") for evaluation in judged]
        before = measures_of(judged[0], "pruned") if judged else {}
        rows.append(
            DotRow(
                name=variant.name,
                mean=None if spread is None else scale * spread.mean,
                deviation=None if spread is None or spread.deviation is None else scale * spread.deviation,
                dots=[scale * figures[measure] for figures in found if measure in figures],
                before=scale * before[measure] if has_many_students and measure in before else None,
                status=_status(variant) if spread is None else "",
            )
        )
    models = {"teacher": sweep.teacher or {}} if has_many_students else before_training(sweep)
    levels = {name: scale * figures[measure] for name, figures in models.items() if measure in figures}
    if measure == "kl":
        levels.pop("teacher", None)
    words, _, less_is_better = _QUALITIES[measure]
    towards = "left" if less_is_better else "right"
    name = MEASURES[measure][0] if measure in MEASURES else words.split(" (")[0].split(",")[0]
    caption = f"Large dots are means, bars standard deviations, small dots single seeds; better is to the {towards}."
    if has_many_students:
        caption += " Diamonds are the students before training."
    return dots_figure(
        f"variants-{measure.replace('_', '-')}",
        f"{name[0].upper()}{name[1:]} of the recovered students",
        rows,
        x_label=words,
        levels=levels,
        caption=caption,
    )


def _failures(sweep: SweepResult) -> Sequence[Table]:
    failed: dict[tuple[str, str], list[str]] = {}
    for variant in sweep.variants:
        for run in variant.runs:
            if run.status == "failed":
                failed.setdefault((run.variant, run.error or "no message"), []).append(str(run.seed))
    if not failed:
        return []
    rows = [[variant, message, ", ".join(seeds)] for (variant, message), seeds in failed.items()]
    caption = "What failed runs said; they count in no mean. To try them again: coldstill ablate --retry"
    return [Table(caption, ["variant", "message", "seeds"], rows, word_columns=frozenset({0, 1}))]


def _cost(sweep: SweepResult) -> Section:
    blocks: list[Block] = []
    measures = {name: parts for name, parts in _COSTS.items() if _best(sweep, name) is not None}
    if not measures:
        blocks.append(Missing("No run is complete yet; run: coldstill ablate"))
    else:
        caption = "Of one run, mean ± standard deviation over seeds."
        if SECONDS_PER_POINT in measures:
            of_tasks = _best(sweep, RETENTION) is not None
            point = "of retention gained" if of_tasks else "of the gap in KL to the teacher that was closed"
            caption += f" A point is a percentage point {point}."
        blocks.append(_table(sweep, measures, caption, with_models=False))
    stage_one = sweep.precompute
    if stage_one is None:
        blocks.append(Missing("What stage one cost is not known: the store was complete before this sweep began."))
    else:
        tokens, seconds = stage_one["computed_tokens"], stage_one["seconds"]
        rows = [["tokens that the teacher read", f"{tokens:,}"], ["time", format_duration(seconds)]]
        if tokens:
            rows.append(["rate", f"{tokens / seconds:,.0f} tokens/s"])
            rows.append(["written", f"{stage_one['written_bytes'] / tokens:,.0f} bytes a token"])
        blocks.append(Table("Stage one, once for all variants.", ["", "cost"], rows))
    return Section("cost", "Cost", blocks)
