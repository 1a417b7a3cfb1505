"""What a sweep has found so far, read from its folder: every run's figures, and their mean and deviation over seeds.

<output>/
    sweep.json          the plan and how each run ended, written whole after each change
    recipes/<key>.yaml  the resolved recipe of each run
    runs/<key>/         each run's output, as a recipe's `output` is
    logs/<key>.log      the last lines of a run that failed
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from coldstill.pipeline.judging.results import read_results
from coldstill.pipeline.runtime.errors import RecipeError

SWEEP_FILE = "sweep.json"
FORMAT = 1

Status = Literal["complete", "failed", "pending"]
_QUALITIES = ("loss", "perplexity", "kl", "agreement")
TASK_PREFIX = "task/"
RETENTION = "retention"
TASK_AVERAGE = "task_average"
SECONDS_PER_POINT = "seconds_per_point"


@dataclass(frozen=True)
class Spread:
    """A figure over the seeds of a variant.

    Attributes:
        mean: The arithmetic mean.
        deviation: The sample standard deviation (divided by n - 1); None for a single run.
        num: How many runs have the figure.
    """

    mean: float
    deviation: float | None
    num: int


@dataclass(frozen=True)
class RunResult:
    """One run of a sweep: a variant with a seed.

    Attributes:
        variant: The variant's name.
        seed: The seed of training.
        key: The run's name; variants whose recipes give the same result share it.
        output: The run's folder.
        status: `complete` when it is trained and judged.
        error: Why it failed, in one line.
        train: The `TrainSummary`, as it was when the run came to its end.
        evaluation: The `Evaluation`.
    """

    variant: str
    seed: int
    key: str
    output: Path
    status: Status
    error: str | None
    train: dict[str, Any] | None
    evaluation: dict[str, Any] | None


@dataclass(frozen=True)
class VariantResult:
    """A variant over its seeds.

    Attributes:
        name: Its name.
        changes: What it changes of the base recipe, by dotted key.
        runs: One for each seed.
        measures: Of the recovered student, over complete runs: `loss`, `perplexity`, `kl`, `agreement`, `seconds` (of
            training, all steps), `peak_memory_bytes` (of training); where there are tasks `retention` (averaged over
            them), `task_average` (of their values) and `task/<name>`; and `seconds_per_point`, see `seconds_per_point`.
    """

    name: str
    changes: dict[str, Any]
    runs: list[RunResult]
    measures: dict[str, Spread]


@dataclass(frozen=True)
class SweepResult:
    """A whole sweep.

    Attributes:
        folder: The sweep's folder.
        name: Its name.
        variants: In the order of the sweep file.
        teacher: The teacher's measures, as floats; None before any run is judged, and where runs are judged on
            different text, so that no row of figures stands for all.
        pruned: The measures of each student before training: `pruned` where it is one, else `pruned (VARIANTS)`.
        precompute: What stage one did for it, a `PrecomputeSummary`.
    """

    folder: Path
    name: str
    variants: list[VariantResult]
    teacher: dict[str, float] | None
    pruned: dict[str, dict[str, float]]
    precompute: dict[str, Any] | None


def is_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep."""
    return (folder / SWEEP_FILE).is_file()


def read_sweep(folder: Path) -> SweepResult:
    """Read what a sweep has found so far.

    Raises:
        RecipeError: The folder holds no sweep, or one of another version.
    """
    state = read_state(folder)
    if state is None:
        raise RecipeError(f"no sweep in {folder}: it has no {SWEEP_FILE}; run: coldstill ablate SWEEP.yaml")
    variants = [_variant(folder, variant, state["runs"]) for variant in state["variants"]]
    runs = {run.key: run for variant in variants for run in variant.runs if run.evaluation}
    teachers = [measures_of(run.evaluation, "teacher") for run in runs.values() if run.evaluation]
    return SweepResult(
        folder=folder,
        name=state["name"],
        variants=variants,
        teacher=_agreed(teachers),
        pruned=_pruned(variants, state["runs"]),
        precompute=state["precompute"],
    )


def before_training(sweep: SweepResult) -> dict[str, dict[str, float]]:
    """Return the measures of the teacher and of each student before training, by what a person calls them."""
    return {**({} if sweep.teacher is None else {"teacher": sweep.teacher}), **sweep.pruned}


def read_state(folder: Path) -> dict[str, Any] | None:
    """Return what `sweep.json` says; None where there is none.

    Raises:
        RecipeError: Another version wrote it.
    """
    try:
        state: dict[str, Any] = json.loads((folder / SWEEP_FILE).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise RecipeError(f"{folder / SWEEP_FILE} is damaged: {error}; remove it, the runs beside it stay") from None
    if state.get("format") != FORMAT:
        raise RecipeError(f"{folder / SWEEP_FILE} has format {state.get('format')}, this version reads {FORMAT}")
    return state


def output_of(folder: Path, key: str) -> Path:
    """Return the output of a run of the sweep in a folder."""
    return folder / "runs" / key


def spread_of(values: Iterable[float]) -> Spread:
    """Return mean and sample standard deviation of at least one value."""
    found = list(values)
    # An infinite perplexity has a mean, and no deviation.
    is_finite = all(map(math.isfinite, found))
    deviation = (statistics.stdev(found) if is_finite else math.nan) if len(found) > 1 else None
    return Spread(statistics.fmean(found), deviation, len(found))


def measures_of(evaluation: Mapping[str, Any], model: str) -> dict[str, float]:
    """Return the figures of one model of an evaluation: `loss`, `perplexity`, `kl`, `agreement`, and those of tasks."""
    quality = evaluation["models"].get(model, {})
    measures = {name: float(quality[name]) for name in _QUALITIES if name in quality}
    for task, result in (evaluation.get("tasks") or {}).items():
        if model in result["models"]:
            measures[f"{TASK_PREFIX}{task}"] = float(result["models"][model]["value"])
    of_tasks = [value for name, value in measures.items() if name.startswith(TASK_PREFIX)]
    if of_tasks:
        measures[TASK_AVERAGE] = statistics.fmean(of_tasks)
    average = evaluation.get("task_average")
    if average:
        retention = {"teacher": {"value": 1.0}, **average["retention"]}.get(model)
        if retention is not None:
            measures[RETENTION] = float(retention["value"])
    return measures


def seconds_per_point(evaluation: Mapping[str, Any], seconds: float) -> float | None:
    """Return what a percentage point of recovery cost, in seconds of training.

    None where training recovered nothing, and where pruning opened no gap, so that there was nothing to recover.

    Where there are tasks a point is one of retention, averaged over tasks, gained over the pruned student; elsewhere
    one of the gap in KL to the teacher that training closed.
    """
    pruned, recovered = (measures_of(evaluation, model) for model in ("pruned", "recovered"))
    if RETENTION in recovered and RETENTION in pruned:
        has_gap = evaluation["task_average"].get("gap_closed") is not None
        points = 100 * (recovered[RETENTION] - pruned[RETENTION]) if has_gap else 0.0
    else:
        points = 100 * ((evaluation.get("gap_closed") or {}).get("kl") or 0.0)
    return seconds / points if points > 0 else None


def _pruned(variants: list[VariantResult], states: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the measures of each student before training, named after the variants that train it."""
    found: dict[str, list[dict[str, float]]] = {}
    trained_by: dict[str, dict[str, None]] = {}
    for variant in variants:
        for run in variant.runs:
            if run.evaluation:
                student = str(states[run.key].get("student"))
                found.setdefault(student, []).append(measures_of(run.evaluation, "pruned"))
                trained_by.setdefault(student, {})[variant.name] = None
    agreed = {student: _agreed(measures) for student, measures in found.items()}
    return {
        "pruned" if len(found) == 1 else f"pruned ({', '.join(trained_by[student])})": measures
        for student, measures in agreed.items()
        if measures is not None
    }


def _variant(folder: Path, variant: Mapping[str, Any], states: Mapping[str, Any]) -> VariantResult:
    runs = [
        _run(folder, variant["name"], int(run["seed"]), str(run["key"]), states[run["key"]]) for run in variant["runs"]
    ]
    found: dict[str, list[float]] = {}
    complete = [run for run in runs if run.status == "complete"]
    for run in complete:
        for name, value in _run_measures(run).items():
            found.setdefault(name, []).append(value)
    if len(found.get(SECONDS_PER_POINT, [])) < len(complete):
        # A mean over the runs that recovered something, when others did not, would flatter.
        found.pop(SECONDS_PER_POINT, None)
    measures = {name: spread_of(values) for name, values in found.items()}
    return VariantResult(variant["name"], variant["changes"], runs, measures)


def _run(folder: Path, variant: str, seed: int, key: str, state: Mapping[str, Any]) -> RunResult:
    output = output_of(folder, key)
    train = _read(output / "train.json", "summary")
    evaluation = read_results(output)
    status: Status = state["status"]
    if status == "complete" and (train is None or evaluation is None):
        status = "pending"  # its folder is gone
    return RunResult(variant, seed, key, output, status, state.get("error"), train, evaluation)


def _run_measures(run: RunResult) -> dict[str, float]:
    if run.train is None or run.evaluation is None:
        return {}
    seconds = float(run.train["seconds"])
    measures = measures_of(run.evaluation, "recovered")
    measures |= {"seconds": seconds, "peak_memory_bytes": float(run.train["peak_memory_bytes"])}
    cost = seconds_per_point(run.evaluation, seconds)
    return measures if cost is None else {**measures, SECONDS_PER_POINT: cost}


def _read(file: Path, part: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(file.read_text())[part]
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found


def _agreed(found: list[dict[str, float]]) -> dict[str, float] | None:
    """Return what all runs found of one model; None where they were judged on different text."""
    if not found:
        return None
    first = found[0]
    shared = {name for name in _QUALITIES if name in first}
    if any(
        not math.isclose(other.get(name, math.nan), first[name], rel_tol=1e-4) for other in found for name in shared
    ):
        return None
    # The one with the most figures: a run that was judged earlier may have no tasks.
    return max(found, key=len)
