"""A sweep as the tables that a person reads: quality, tasks, cost, and what failed. Nothing is decided here."""

from collections.abc import Callable, Iterator, Mapping

from rich.table import Table

from coldstill.pipeline.runtime.units import format_duration, format_size
from coldstill.pipeline.sweeps.results import RETENTION, SECONDS_PER_POINT, TASK_AVERAGE, SweepResult, before_training

_Formats = Mapping[str, tuple[str, Callable[[float], str]]]


def _percent(value: float) -> str:
    return f"{value:.1%}"


# By measure: the heading, and how a value is written.
_QUALITIES: _Formats = {
    "perplexity": ("perplexity", lambda value: f"{value:,.2f}"),
    "kl": ("KL (nats)", lambda value: f"{value:.4f}"),
    "agreement": ("agreement", _percent),
}
_TASKS: _Formats = {RETENTION: ("retention", _percent), TASK_AVERAGE: ("task average", _percent)}
_COSTS: _Formats = {
    "seconds": ("training", format_duration),
    "peak_memory_bytes": ("peak memory", format_size),
    SECONDS_PER_POINT: ("a point", lambda value: f"{value:,.1f} s"),
}


def sweep_tables(result: SweepResult) -> Iterator[Table]:
    """Show one line a variant, mean and deviation over its seeds, under the teacher's and the pruned students'."""
    yield _table(result, _QUALITIES, title=f"{result.name}: held-out text, recovered students")
    if _has_tasks(result):
        yield _table(result, _TASKS, title="tasks")
    yield _table(result, _COSTS, title="cost", are_of_models=False)


def sweep_lines(result: SweepResult) -> Iterator[str]:
    """Say what a point is, what failed, and what is missing."""
    measured = [variant.measures for variant in result.variants]
    if any(SECONDS_PER_POINT in measures for measures in measured):
        gained = "of retention gained" if _has_tasks(result) else "of the gap in KL that was closed"
        yield f"a point is a percentage point {gained}; what it cost is in seconds of training"
    if any(measures for measures in measured) and result.teacher is None:
        yield "runs were judged on different text: no teacher stands for all of them; each run has its own evaluation"
    failed = set()
    for variant in result.variants:
        seeds: dict[str, list[str]] = {}
        for run in variant.runs:
            if run.status == "failed":
                seeds.setdefault(run.error or "", []).append(str(run.seed))
                failed.add(run.key)
        for error, numbers in seeds.items():
            yield f"{variant.name}, seed {', '.join(numbers)}: failed: {error}"
    if failed:
        logs = result.folder / "logs"
        yield f"{len(failed)} failed, their last lines are in {logs}; to try again: coldstill ablate --retry"


def _table(result: SweepResult, formats: _Formats, *, title: str, are_of_models: bool = True) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("variant", overflow="fold")
    for heading in ("runs", *(heading for heading, _ in formats.values())):
        table.add_column(heading, justify="right")
    if are_of_models:
        for name, measures in before_training(result).items():
            cells = [show(measures[measure]) if measure in measures else "-" for measure, (_, show) in formats.items()]
            table.add_row(name, "", *cells)
        table.add_section()
    for variant in result.variants:
        cells = []
        for measure, (_, show) in formats.items():
            spread = variant.measures.get(measure)
            deviation = f" ± {show(spread.deviation)}" if spread is not None and spread.deviation is not None else ""
            cells.append("-" if spread is None else f"{show(spread.mean)}{deviation}")
        if all(run.status == "failed" for run in variant.runs):
            cells[0] = "failed"
        num_complete = sum(run.status == "complete" for run in variant.runs)
        is_whole = num_complete == len(variant.runs)
        table.add_row(variant.name, str(num_complete) if is_whole else f"{num_complete} of {len(variant.runs)}", *cells)
    return table


def _has_tasks(result: SweepResult) -> bool:
    return any(TASK_AVERAGE in variant.measures for variant in result.variants)
