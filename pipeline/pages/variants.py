"""The sections of a sweep's report on single variants: curves of training, how near blocks come, runs and changes."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from coldstill.pipeline.figures.curves import Points, curve_figure
from coldstill.pipeline.figures.sheet import LIGHT, Figure
from coldstill.pipeline.losses.objective import TERMS, Objective
from coldstill.pipeline.losses.term import BlockTerm, Term
from coldstill.pipeline.pages.data import is_run
from coldstill.pipeline.pages.loss_curves import logged
from coldstill.pipeline.pages.numbers import list_words, show_measure
from coldstill.pipeline.pages.page import Block, Code, Figures, Folded, Missing, Section, Table, Words
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.runtime.units import format_duration
from coldstill.pipeline.sweeps.results import RunResult, SweepResult, VariantResult, measures_of

if TYPE_CHECKING:
    from coldstill.pipeline.judging.similarity import BlockSimilarity

_MOST_LINES = len(LIGHT)


def training_section(sweep: SweepResult) -> Section:
    """Draw each term of the loss over the steps, one line a variant: its first complete run."""
    figures: list[Figure] = []
    lines = _lines(sweep)
    for (term, unit), series in lines.items():
        chosen = dict(list(series.items())[:_MOST_LINES])
        some = "" if len(chosen) == len(series) else f" The first {len(chosen)} of {len(series)} variants are drawn."
        if len(series) == 1 < len(sweep.variants):
            some = f" Only {next(iter(series))} has it."
        figures.append(
            curve_figure(
                f"curves-{term.name.replace('_', '-')}-{len(figures)}",
                term.title,
                chosen,
                x_label="optimizer step",
                y_label=unit,
                is_log=issubclass(term, BlockTerm),
                caption=f"Training, the first seed of each variant that has this term, before its weight.{some}",
            )
        )
    title = "Loss over steps"
    if not figures:
        return Section("training", title, [Missing("No complete run has logged a term; run: coldstill ablate")])
    return Section("training", title, [Figures(figures)])


def _lines(sweep: SweepResult) -> dict[tuple[type[Term], str], dict[str, Points]]:
    """Return, by term and unit, the points of each variant; kinds of hidden loss that differ share no axis."""
    lines: dict[tuple[type[Term], str], dict[str, Points]] = {}
    for variant in sweep.variants:
        run = first_complete(variant)
        if run is None:
            continue
        log = json.loads((run.output / "train.json").read_text())["log"]
        loss = load_recipe(run.output / "student" / "recipe.yaml").loss
        for term in Objective.of(loss).terms:
            points = [(step, value) for step, value in logged(log, term.name) if value > 0]
            unit = f"{term.unit} (log axis)" if isinstance(term, BlockTerm) else term.unit
            if points:
                lines.setdefault((type(term), unit), {})[variant.name] = points
    return {key: lines[key] for key in sorted(lines, key=lambda key: TERMS.index(key[0]))}


def nearest_blocks_section(found: "Mapping[str, BlockSimilarity | str]") -> Section:
    """Draw how near a student's nearest block comes to each of the teacher's, one line a variant.

    Args:
        found: Of the first complete run of each variant; a text says why nobody knows.
    """
    compared = {name: similarity for name, similarity in found.items() if not isinstance(similarity, str)}
    blocks: list[Block] = []
    figures = [
        _nearest_figure(measure, of_measure)
        for measure in ("cosine", "cka")
        if (of_measure := {name: one for name, one in compared.items() if one.measure == measure})
    ]
    if figures:
        one = next(iter(compared.values()))
        said = (
            f"Of the first seed of each variant, measured on {one.num_positions:,} positions of {one.num_rows} eval "
            "rows: of all the student's blocks the one that is the most like the teacher's, so that variants compare "
            "which learned from other blocks, or from none."
        )
        blocks += [Figures(figures), Words(said)]
    reasons: dict[str, list[str]] = {}
    for name, similarity in found.items():
        if isinstance(similarity, str):
            reasons.setdefault(similarity, []).append(name)
    for reason, names in reasons.items():
        blocks.append(
            Missing(f"Blocks of {list_words([repr(name) for name in names])} could not be compared: {reason}")
        )
    if not found:
        blocks.append(Missing("No run is complete yet; run: coldstill ablate"))
    return Section("similarity", "Block similarity", blocks)


def _nearest_figure(measure: str, found: "Mapping[str, BlockSimilarity]") -> Figure:
    pruned = [_nearest(similarity.teacher_blocks, similarity.pruned) for similarity in found.values()]
    lines = {"before training": pruned[0]} if all(points == pruned[0] for points in pruned) else {}
    lines |= {name: _nearest(similarity.teacher_blocks, similarity.recovered) for name, similarity in found.items()}
    chosen = dict(list(lines.items())[:_MOST_LINES])
    some = "" if len(chosen) == len(lines) else f" The first {len(chosen)} of {len(lines)} lines are drawn."
    return curve_figure(
        f"nearest-blocks-{measure}",
        "Nearest student block to each teacher block",
        chosen,
        x_label="teacher block",
        y_label="mean cosine" if measure == "cosine" else "linear CKA",
        caption=f"The higher, the nearer the student's states are to the teacher's; stored blocks only.{some}",
    )


def _nearest(teacher_blocks: Sequence[int], matrix: Sequence[Sequence[float]]) -> Points:
    """Give, for each teacher block, the highest likeness of any student block; rows of the matrix are the student's."""
    return [(block, max(row[column] for row in matrix)) for column, block in enumerate(teacher_blocks)]


def variants_section(sweep: SweepResult) -> Section:
    """List, for each variant, what it changes and how each of its runs ended; and what all share."""
    blocks: list[Block] = [_folded(variant) for variant in sweep.variants]
    recipes = [recipe for variant in sweep.variants if (recipe := _recipe(sweep, variant)) is not None]
    if recipes:
        text = yaml.safe_dump(_shared(recipes), sort_keys=False, allow_unicode=True)
        blocks.append(Folded("What all variants share", [Code("resolved recipe, where all agree", text)]))
    run = next((run for variant in sweep.variants if (run := first_complete(variant))), None)
    if run is not None:
        record = json.loads((run.output / "student" / "provenance.json").read_text())
        made = {name: record[name] for name in ("store", "teacher", "versions", "hardware") if name in record}
        blocks.append(Folded("Provenance", [Code("of the first complete run", json.dumps(made, indent=1))]))
    return Section("variants", "Variants, recipe and provenance", blocks)


def _folded(variant: VariantResult) -> Folded:
    rows = [_row(run) for run in variant.runs]
    headings = ["seed", "status", "perplexity", "KL (nats a token)", "agreement", "training", "run"]
    words = frozenset({0, 1, 6})
    table = Table("One row a seed; the run is a folder in runs/ of the sweep.", headings, rows, word_columns=words)
    changes = yaml.safe_dump(variant.changes, sort_keys=False, allow_unicode=True) if variant.changes else "nothing"
    return Folded(variant.name, [Code("changes of the base recipe", changes), table])


def _row(run: RunResult) -> list[str]:
    measures = {} if run.evaluation is None else measures_of(run.evaluation, "recovered")
    qualities = [show_measure(name, measures.get(name)) for name in ("perplexity", "kl", "agreement")]
    seconds = "-" if run.train is None else format_duration(run.train["seconds"])
    status = run.status if run.error is None else f"{run.status}: {run.error}"
    return [str(run.seed), status, *qualities, seconds, run.key]


def first_complete(variant: VariantResult) -> RunResult | None:
    """Return the first run of a variant that is complete, by order of seeds."""
    return next((run for run in variant.runs if run.status == "complete" and is_run(run.output)), None)


def _recipe(sweep: SweepResult, variant: VariantResult) -> dict[str, Any] | None:
    file = sweep.folder / "recipes" / f"{variant.runs[0].key}.yaml"
    return load_recipe(file).model_dump(exclude={"output"}) if file.is_file() else None


def _shared(recipes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the part of nested maps in which all agree."""
    first, *others = recipes
    shared: dict[str, Any] = {}
    for key, value in first.items():
        found = [other.get(key) for other in others]
        if all(item == value for item in found):
            shared[key] = value
        elif isinstance(value, Mapping) and all(isinstance(item, Mapping) for item in found):
            inner = _shared([value, *(item for item in found if isinstance(item, Mapping))])
            shared |= {key: inner} if inner else {}
    return shared
