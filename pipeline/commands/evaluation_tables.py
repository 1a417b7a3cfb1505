"""An evaluation as the tables that a person reads. Nothing is decided here."""

import dataclasses
from typing import TYPE_CHECKING

from rich.table import Table

from pipeline.commands.summaries import console

if TYPE_CHECKING:  # a table does not wait for torch
    from pipeline.evaluate import Evaluation
    from pipeline.retention import Estimate
    from pipeline.task_scores import TaskAverage, TaskComparison

_MEASURES = {
    "loss": "loss (nats)",
    "perplexity": "perplexity",
    "kl": "KL to teacher (nats)",
    "agreement": "top-1 agreement",
}


def print_evaluation(result: "Evaluation") -> None:
    """Print one line a model and measure, and the share of each gap that training closed; then the tasks, if any."""
    console().print(_held_out_table(result))
    if result.tasks:
        console().print(task_table(result))


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


def _held_out_table(result: "Evaluation") -> Table:
    table = Table(title=f"Held-out text, {result.num_tokens:,} tokens", title_justify="left")
    table.add_column("model")
    for heading in _MEASURES.values():
        table.add_column(heading, justify="right")
    for name, quality in result.models.items():
        values = dataclasses.asdict(quality)
        table.add_row(name, *(_measure(measure, values[measure]) for measure in _MEASURES))
    if result.gap_closed:
        shares = [result.gap_closed[measure] for measure in _MEASURES]
        table.add_section()
        table.add_row("gap closed", *("-" if share is None else f"{share:.1%}" for share in shares))
    return table


def _measure(name: str, value: float) -> str:
    return f"{value:.1%}" if name == "agreement" else f"{value:.2f}" if name == "perplexity" else f"{value:.4f}"


def _cells(comparison: "TaskComparison | TaskAverage", names: list[str]) -> list[str]:
    values = [comparison.models[name] for name in names]
    is_share = all(0 <= estimate.value <= 1 for estimate in values)
    shares = (comparison.retention.get(names[-1]), comparison.gap_closed)
    return [*(_cell(value, is_share=is_share) for value in values), *(_cell(share, is_share=True) for share in shares)]


def _cell(estimate: "Estimate | None", *, is_share: bool) -> str:
    if estimate is None:
        return "-"
    form = ".1%" if is_share else ",.2f"
    return f"{estimate.value:{form}}\n± {'?' if estimate.stderr is None else f'{estimate.stderr:{form}}'}"
