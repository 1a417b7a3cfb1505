"""Judge teacher, pruned and recovered student: on the eval rows, where the teacher speaks from the store, and on tasks.

Where the recipe names tasks the teacher itself is run, once for all recipes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from coldstill.pipeline.judging.eval_rows import EvalRows, sums_of
from coldstill.pipeline.judging.qualities import Domain, Quality, differences, domain_of, quality_of
from coldstill.pipeline.judging.results import write_evaluation
from coldstill.pipeline.judging.task_scores import TaskAverage, TaskComparison, compare_on_tasks
from coldstill.pipeline.judging.tasks import load_tasks
from coldstill.pipeline.models import resolve_device
from coldstill.pipeline.models.machine import check_device
from coldstill.pipeline.outputs.places import check_writable
from coldstill.pipeline.outputs.retention import Estimate
from coldstill.pipeline.outputs.run_index import RunRows, find_run_rows, trained_student
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.runtime.interruptions import what_stays
from coldstill.pipeline.stage_two.model_card import update_card
from coldstill.pipeline.stage_two.run_folder import check_run, claimed_run, what_is_untrained
from coldstill.pipeline.stage_two.target_sources import RowSource, StoredTargets
from coldstill.pipeline.students.folders import find_student


@dataclass(frozen=True)
class Evaluation:
    """The models of a run, side by side.

    Attributes:
        models: `teacher`, `pruned` and, once it is trained, `recovered`.
        gaps: By measure, how much worse the pruned student is than the teacher.
        gains: By measure, how much better the recovered student is than the pruned one; empty before training.
        gap_closed: By measure, (recovered - pruned) / (teacher - pruned); None where there is no gap.
        num_tokens: Positions that counted.
        num_rows: Eval rows, the draws that errors are estimated from.
        tasks: The models on each of the recipe's tasks.
        task_average: Over the tasks where a higher value is better; None where there is none.
        missing: Models that were not judged, and why; empty where all were.
        domains: The same on the rows of each source, by its label, where `data.eval` lists several.
    """

    models: dict[str, Quality]
    gaps: dict[str, Estimate]
    gains: dict[str, Estimate]
    gap_closed: dict[str, float | None]
    num_tokens: int
    num_rows: int
    tasks: dict[str, TaskComparison]
    task_average: TaskAverage | None
    missing: dict[str, str]
    domains: dict[str, Domain] = field(default_factory=dict)


def evaluate(recipe: Recipe, *, show_progress: bool = True) -> Evaluation:
    """Evaluate the recipe's teacher, its student as it was and its student as it is trained.

    Raises:
        StoreError: `precompute` has not made the eval rows complete.
        ModelError: A student cannot be loaded, or a teacher that tasks are to be asked of.
        RecipeError: The output holds another recipe's run or cannot be written, the device is not there, or a task is
            unknown or its questions cannot be loaded.
    """
    check_device("evaluate.device", recipe.evaluate.device)
    check_writable("output", Path(recipe.output))
    check_run(recipe)
    judged: list[str] = []
    with what_stays(lambda: _what_stays(judged)):
        return _evaluate(recipe, judged, show_progress=show_progress)


def _what_stays(judged: Sequence[str]) -> str:
    if not judged:
        return "before a student was judged; the same command begins anew"
    return f"with {' and '.join(judged)} judged on the eval rows; run the same command again to go on"


def _sources(recipe: Recipe) -> tuple[RunRows, RowSource, RowSource]:
    """Find the eval rows, and where the teacher's distribution and its own loss come from."""
    if recipe.targets.is_live:
        # Imported here: where a store speaks for the teacher, nothing that loads one is.
        from coldstill.pipeline.stage_one.live_run import gather_live

        live = gather_live(recipe)
        return live.run, live.judged(), live.judged()
    run = find_run_rows(recipe)
    sources = StoredTargets.of_judging(run, recipe.local_copy), StoredTargets.of_numbers(run, recipe.local_copy)
    for source in sources:
        source.require_complete("eval")
    return run, *sources


def _evaluate(recipe: Recipe, judged: list[str], *, show_progress: bool) -> Evaluation:
    tasks = load_tasks(recipe.evaluate) if recipe.evaluate.tasks else []
    run, source, numbers = _sources(recipe)
    rows = EvalRows(source, numbers, resolve_device(recipe.evaluate.device))
    folders = {"pruned": find_student(recipe)}
    untrained = what_is_untrained(recipe)
    if untrained is None:
        folders["recovered"] = trained_student(recipe)
    sums = {"teacher": rows.teacher}
    for name, folder in folders.items():
        sums[name] = sums_of(recipe, run, rows, folder, name, show_progress=show_progress)
        judged.append(name)
    compared, average = (
        compare_on_tasks(recipe, run, folders, tasks, show_progress=show_progress) if tasks else ({}, None)
    )
    found = differences(sums, rows.counts)
    result = Evaluation(
        models={name: quality_of(of_rows, rows.counts) for name, of_rows in sums.items()},
        gaps=found.gaps,
        gains=found.gains,
        gap_closed=found.gap_closed,
        num_tokens=sum(rows.counts),
        num_rows=len(rows),
        tasks=compared,
        task_average=average,
        missing={} if untrained is None else {"recovered": untrained},
        domains={label: domain_of(sums, rows.counts, of_label) for label, of_label in run.domains("eval").items()},
    )
    facts = {"store": run.store.name, "selection": run.selections["eval"].name, "run": claimed_run(recipe)}
    write_evaluation(recipe, asdict(result), facts)
    if "recovered" in folders:
        update_card(recipe, run, folders["pruned"], asdict(result))
    return result
