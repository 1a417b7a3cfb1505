"""The sections of a run's report that say what was recovered: on held-out text and on tasks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coldstill.pipeline.figures.dots import DotRow, dots_figure
from coldstill.pipeline.outputs.retention import NO_GAP, NO_GAP_REASON
from coldstill.pipeline.pages.data import RunRecord
from coldstill.pipeline.pages.numbers import MEASURES, estimate, heading, is_number, percent, show_measure
from coldstill.pipeline.pages.page import Beside, Block, Figures, Missing, Section, Table, Tile, Words
from coldstill.pipeline.students.pruning_record import describe_cut


def run_subtitle(run: RunRecord) -> str:
    """Say in one line whose student this is."""
    name = run.recipe.teacher.path if run.store is None else str(run.store.teacher["name"])
    blocks = f"{run.num_student_blocks} blocks"
    if run.num_teacher_blocks is not None:
        blocks = f"blocks {run.num_teacher_blocks} to {run.num_student_blocks}"
    size = blocks if run.pruning is None else describe_cut(run.pruning)
    tokens = "" if run.store is None else f" on {run.store.num_tokens['train']:,} tokens"
    return f"Student of {Path(name).name}: {size}. Trained for {run.summary['num_steps']:,} steps{tokens}."


def recovery_tiles(run: RunRecord) -> list[Tile]:
    """Return the figures to see first."""
    if run.evaluation is None:
        return []
    models, tiles = run.evaluation["models"], []
    for measure in ("perplexity", "kl", "agreement"):
        values = {name: show_measure(measure, models[name][measure]) for name in ("teacher", "pruned", "recovered")}
        teacher = "" if measure == "kl" else f", teacher {values['teacher']}"
        tiles.append(Tile(MEASURES[measure][0], values["recovered"], f"pruned {values['pruned']}{teacher}"))
    average = run.evaluation.get("task_average")
    if average:
        before, after = (percent(average["retention"][name]["value"]) for name in ("pruned", "recovered"))
        tiles.append(Tile("retention of tasks", after, f"pruned {before}"))
    return tiles


def recovery_section(run: RunRecord) -> Section:
    """Hold teacher, pruned and recovered student side by side."""
    evaluation = run.evaluation
    if evaluation is None:
        why = "This run is not judged yet, or was trained again since; run: coldstill evaluate"
        return Section("recovery", "Recovery", [Missing(why)])
    figure = _gap_figure(evaluation) or Missing("Pruning opened no gap, so there is no share of it to draw.")
    blocks: list[Block] = [Beside([_recovery_table(evaluation, "Held-out text"), figure])]
    domains = evaluation.get("domains") or {}
    blocks += [_recovery_table(domain, f"Held-out text of {label}") for label, domain in domains.items()]
    tasks = evaluation.get("tasks") or {}
    if tasks:
        blocks.append(_task_table(evaluation))
    shares = [share for found in (evaluation, *domains.values()) for share in found["gap_closed"].values()]
    if None in [*shares, *(task["gap_closed"] for task in tasks.values())]:
        blocks.append(Words(f"{NO_GAP_REASON[0].upper()}{NO_GAP_REASON[1:]}."))
    if not tasks:
        blocks.append(Missing("No benchmark tasks; name some in evaluate.tasks, and run: coldstill evaluate"))
    return Section("recovery", "Recovery", blocks)


def _recovery_table(evaluation: Mapping[str, Any], what: str) -> Table:
    rows = [
        [name, *(show_measure(measure, quality[measure]) for measure in MEASURES)]
        for name, quality in evaluation["models"].items()
    ]
    shares = [evaluation["gap_closed"].get(measure) for measure in MEASURES]
    rows.append(["gap closed", *(NO_GAP if share is None else percent(share) for share in shares)])
    return Table(
        f"{what}, {evaluation['num_tokens']:,} tokens. Gap closed is (recovered - pruned) / (teacher - pruned).",
        ["model", *map(heading, MEASURES)],
        rows,
        strong=frozenset((list(evaluation["models"]).index("recovered"), column + 1) for column in range(4)),
    )


def _task_table(evaluation: Mapping[str, Any]) -> Table:
    models = list(evaluation["models"])
    rows = []
    compared = [(f"{name}, {task['metric']}", task) for name, task in evaluation["tasks"].items()]
    if evaluation.get("task_average"):
        compared.append(("average", evaluation["task_average"]))
    for name, task in compared:
        scores = [task["models"].get(model) for model in models]
        is_share = all(score is None or 0 <= score["value"] <= 1 for score in scores)
        kept = [task["retention"].get(model) for model in models if model != "teacher"]
        cells = [*(estimate(score, is_share=is_share) for score in scores), *map(estimate, kept)]
        rows.append([name, *cells, NO_GAP if task["gap_closed"] is None else estimate(task["gap_closed"])])
    retention = [f"retention, {model}" for model in models if model != "teacher"]
    return Table(
        "Benchmark tasks, value ± standard error. Retention is a model's value over the teacher's.",
        ["task", *models, *retention, "gap closed"],
        rows,
    )


def _gap_figure(evaluation: Mapping[str, Any]) -> Figures | None:
    shares = [(MEASURES[name][0], evaluation["gap_closed"].get(name), None) for name in MEASURES]
    for name, task in (evaluation.get("tasks") or {}).items():
        closed = task["gap_closed"] or {"value": None, "stderr": None}
        shares.append((name, closed["value"], closed["stderr"]))
    rows = [
        DotRow(name, 100 * value, None if stderr is None else 100 * stderr)
        for name, value, stderr in shares
        if is_number(value)
    ]
    if not rows:
        return None
    bars = "; bars are standard errors" if any(row.deviation for row in rows) else ""
    figure = dots_figure(
        "gap-closed",
        "Share of the gap that training closed",
        rows,
        x_label="gap closed (%)",
        y_label="measure",
        levels={"pruned": 0.0, "teacher": 100.0},
        caption=f"A dot at 0% is as the pruned student was, one at 100% as the teacher is{bars}.",
    )
    return Figures([figure])
