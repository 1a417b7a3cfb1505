"""An evaluation as the tables that a person reads. Nothing is decided here."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from coldstill.pipeline.commands.shared import console
from coldstill.pipeline.outputs.retention import NO_GAP, NO_GAP_REASON

if TYPE_CHECKING:  # a table does not wait for torch
    from coldstill.pipeline.evaluate import Evaluation
    from coldstill.pipeline.judging.qualities import Domain
    from coldstill.pipeline.judging.task_scores import TaskAverage, TaskComparison
    from coldstill.pipeline.outputs.retention import Estimate

_MEASURES = {
    "loss": "loss (nats)",
    "perplexity": "perplexity",
    "kl": "KL to teacher (nats)",
    "agreement": "top-1 agreement",
}


def print_evaluation(result: "Evaluation") -> None:
    """Print one line a model and measure, and the share of each gap that training closed; then the tasks, if any."""
    console().print(_held_out_table(result, "Held-out text"))
    for label, domain in result.domains.items():
        console().print(_held_out_table(domain, f"Held-out text of {label}"))
    if result.tasks:
        console().print(task_table(result))
    for line in _notes(result):
        print(line)


def _notes(result: "Evaluation") -> Iterator[str]:
    """Say which models are missing and why, and what a gap that is none means."""
    for name, reason in result.missing.items():
        yield f"{name} is not judged: {reason}"
    compared: list[TaskComparison | TaskAverage] = [
        *result.tasks.values(),
        *([result.task_average] if result.task_average else []),
    ]
    measured = [result.gap_closed, *(domain.gap_closed for domain in result.domains.values())]
    shares = [share for by_measure in measured for share in by_measure.values()]
    if "recovered" in result.models and None in [*shares, *(comparison.gap_closed for comparison in compared)]:
        yield NO_GAP_REASON


def task_table(result: "Evaluation") -> Table:
    """Show the models' scores on each task, and of the last student what it kept and what training brought back.

    The line below a value is its standard error.
    """
    names = list(result.models)
    counts = sorted({comparison.num_samples for comparison in result.tasks.values()})
    title = f"Tasks, {f'{counts[0]:,}' if len(counts) == 1 else f'{counts[0]:,} to {counts[-1]:,}'} questions"
    table = Table(title=f"{title} (± standard error)", title_justify="left")
    table.add_column("task", overflow="fold")
    for heading in (*names, "retention", "gap closed"):
        table.add_column(heading, justify="right", no_wrap=True)
    for task, comparison in result.tasks.items():
        table.add_row(f"{task}\n{comparison.metric}", *_cells(comparison, names))
    if result.task_average is not None and len(result.tasks) > 1:
        table.add_section()
        counted = sum(comparison.higher_is_better for comparison in result.tasks.values())
        table.add_row(f"average\nof {counted} task{'' if counted == 1 else 's'}", *_cells(result.task_average, names))
    return table


def _held_out_table(result: "Evaluation | Domain", what: str) -> Table:
    table = Table(title=f"{what}, {result.num_tokens:,} tokens", title_justify="left")
    table.add_column("model")
    for heading in _MEASURES.values():
        table.add_column(heading, justify="right")
    for name, quality in result.models.items():
        values = dataclasses.asdict(quality)
        table.add_row(name, *(_measure(measure, values[measure]) for measure in _MEASURES))
    if result.gap_closed:
        shares = [result.gap_closed[measure] for measure in _MEASURES]
        table.add_section()
        table.add_row("gap closed", *(NO_GAP if share is None else f"{share:.1%}" for share in shares))
    return table


def _measure(name: str, value: float) -> str:
    return f"{value:.1%}" if name == "agreement" else f"{value:.2f}" if name == "perplexity" else f"{value:.4f}"


def _cells(comparison: "TaskComparison | TaskAverage", names: list[str]) -> list[str]:
    values = [comparison.models[name] for name in names]
    is_share = all(0 <= estimate.value <= 1 for estimate in values)
    has_no_gap = "recovered" in names and comparison.gap_closed is None
    return [
        *(_cell(value, is_share=is_share) for value in values),
        _cell(comparison.retention.get(names[-1]), is_share=True),
        NO_GAP if has_no_gap else _cell(comparison.gap_closed, is_share=True),
    ]


def _cell(estimate: "Estimate | None", *, is_share: bool) -> str:
    if estimate is None:
        return "-"
    form = ".1%" if is_share else ",.2f"
    return f"{estimate.value:{form}}\n± {'?' if estimate.stderr is None else f'{estimate.stderr:{form}}'}"
