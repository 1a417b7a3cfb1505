"""The sections of a sweep's report on single variants: their training curves, their runs, what they change."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from pipeline.figures.curves import Points, curve_figure
from pipeline.figures.sheet import LIGHT, Figure
from pipeline.recipe_file import load_recipe
from pipeline.reports.data import is_run
from pipeline.reports.numbers import HIDDEN_UNITS, show_measure
from pipeline.reports.page import Block, Code, Figures, Folded, Missing, Section, Table
from pipeline.reports.training import logged
from pipeline.sweeps.results import RunResult, SweepResult, VariantResult, measures_of
from pipeline.units import format_duration

_TERMS = {
    "loss_task": "Task loss (cross entropy)",
    "loss_logits": "Logits loss",
    "loss_hidden": "Hidden loss",
    "loss_dynamics": "Loss of dynamics",
}
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
                f"curves-{term.replace('_', '-')}-{len(figures)}",
                _TERMS[term],
                chosen,
                x_label="optimizer step",
                y_label=unit,
                is_log=term in ("loss_hidden", "loss_dynamics"),
                caption=f"Training, the first seed of each variant that has this term, before its weight.{some}",
            )
        )
    title = "Loss over steps"
    if not figures:
        return Section("training", title, [Missing("No complete run has logged a term; run: coldstill ablate")])
    return Section("training", title, [Figures(figures)])


def _lines(sweep: SweepResult) -> dict[tuple[str, str], dict[str, Points]]:
    """Give, by term and unit, the points of each variant; kinds of hidden loss that differ share no axis."""
    lines: dict[tuple[str, str], dict[str, Points]] = {}
    for variant in sweep.variants:
        run = _first_complete(variant)
        if run is None:
            continue
        log = json.loads((run.output / "train.json").read_text())["log"]
        loss = load_recipe(run.output / "student" / "recipe.yaml").loss
        units = {
            "loss_task": "nats a token",
            "loss_logits": "T² · divergence (nats a token)",
            "loss_hidden": f"{HIDDEN_UNITS[loss.hidden]} (log axis)",
            "loss_dynamics": f"{HIDDEN_UNITS[loss.dynamics]} (log axis)",
        }
        for term, unit in units.items():
            points = [(step, value) for step, value in logged(log, term) if value > 0]
            if points:
                lines.setdefault((term, unit), {})[variant.name] = points
    return {key: lines[key] for key in sorted(lines, key=lambda key: list(_TERMS).index(key[0]))}


def variants_section(sweep: SweepResult) -> Section:
    """List, for each variant, what it changes and how each of its runs ended; and what all share."""
    blocks: list[Block] = [_folded(variant) for variant in sweep.variants]
    recipes = [recipe for variant in sweep.variants if (recipe := _recipe(sweep, variant)) is not None]
    if recipes:
        text = yaml.safe_dump(_shared(recipes), sort_keys=False, allow_unicode=True)
        blocks.append(Folded("What all variants share", [Code("resolved recipe, where all agree", text)]))
    run = next((run for variant in sweep.variants if (run := _first_complete(variant))), None)
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


def _first_complete(variant: VariantResult) -> RunResult | None:
    return next((run for run in variant.runs if run.status == "complete" and is_run(run.output)), None)


def _recipe(sweep: SweepResult, variant: VariantResult) -> dict[str, Any] | None:
    file = sweep.folder / "recipes" / f"{variant.runs[0].key}.yaml"
    return load_recipe(file).model_dump(exclude={"output"}) if file.is_file() else None


def _shared(recipes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Give the part of nested maps in which all agree."""
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
