"""The evaluation in a run's output: its numbers, how they were made, and what they say in words.

<output>/evaluation/
    results.json        the numbers alone: an `Evaluation`
    provenance.json     where, when and with what they were made, and of which run; written last: they are complete
    recipe.yaml         the resolved recipe that asked for them
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from coldstill.pipeline.judging.qualities import HIGHER_IS_BETTER, shares_closed
from coldstill.pipeline.outputs.provenance import PROVENANCE_FILE, write_record
from coldstill.pipeline.outputs.retention import Estimate, improvement, is_above_zero
from coldstill.pipeline.outputs.run_index import trained_student
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.runtime.errors import RecipeError
from coldstill.pipeline.runtime.whole import write_whole
from coldstill.pipeline.stage_two.run_folder import claimed_run

EVALUATION = "evaluation"
RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class Retention:
    """What the trained student kept of the teacher's ability.

    Attributes:
        value: Its score divided by the teacher's, averaged over tasks; or its agreement with the teacher.
        stderr: Of the value; None where it is not known.
        measure: Which of the two: `agreement` is a stand-in.
    """

    value: float
    stderr: float | None
    measure: Literal["tasks", "agreement"]


def write_evaluation(recipe: Recipe, results: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write what an evaluation found into the recipe's output, in place of an earlier one.

    Args:
        recipe: What asked for it.
        results: An `Evaluation` as a map.
        facts: What provenance says of it: `store`, `selection`, and `run`, the key of the run that was judged.
    """
    folder = Path(recipe.output) / EVALUATION
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PROVENANCE_FILE).unlink(missing_ok=True)
    write_whole(folder / RESULTS_FILE, json.dumps(dict(results), indent=1) + "\n")
    write_record(folder, recipe, facts)


def read_results(output: Path) -> dict[str, Any] | None:
    """Read what the evaluation in an output found, whichever version wrote it; None where there is none.

    Earlier versions kept it in the record, without the errors of the differences: there a gap is what its value says.

    Raises:
        RecipeError: A file is damaged.
    """
    folder = output / EVALUATION
    record = _read(folder / PROVENANCE_FILE)
    found = None if record is None else record.get("evaluation") or _read(folder / RESULTS_FILE)
    if found is None or "gaps" in found:
        return found
    models = found["models"]
    gaps = {
        measure: improvement(models["pruned"][measure], models["teacher"][measure], None, higher_is_better=is_higher)
        for measure, is_higher in HIGHER_IS_BETTER.items()
    }
    written = {measure: asdict(gap) for measure, gap in gaps.items()}
    return {**found, "gaps": written, "gains": {}, "gap_closed": shares_closed(models, gaps), "missing": {}}


def read_evaluation(recipe: Recipe) -> dict[str, Any] | None:
    """Read the evaluation of the trained student; None where there is none of this run, or the student is newer.

    Raises:
        RecipeError: A file is damaged.
    """
    results = read_results(Path(recipe.output))
    record, student = (
        _read(folder / PROVENANCE_FILE) for folder in (Path(recipe.output) / EVALUATION, trained_student(recipe))
    )
    if results is None or record is None or student is None or "recovered" not in results["models"]:
        return None
    # Times of one clock: a student that was trained anew is to be judged anew.
    written, trained = (datetime.fromisoformat(found["written_at"]) for found in (record, student))
    # Earlier versions did not say of which run they judged the student.
    is_of_run = record.get("run") is None or record["run"] == claimed_run(recipe)
    return results if written >= trained and is_of_run else None


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(file.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise RecipeError(f"{file} is damaged: {error}; run: coldstill evaluate") from None


def retention_of(evaluation: Mapping[str, Any]) -> Retention:
    """Return what the student retains on tasks, or its agreement with the teacher where no task was evaluated."""
    average = evaluation["task_average"]
    estimate = average["retention"].get("recovered") if average else None
    if estimate is None:
        return Retention(evaluation["models"]["recovered"]["agreement"], None, "agreement")
    return Retention(estimate["value"], estimate["stderr"], "tasks")


def describe_results(evaluation: Mapping[str, Any]) -> str:
    """Say how the student compares with its teacher and with itself before training."""
    models = evaluation["models"]
    pruned, recovered = models["pruned"], models["recovered"]
    closed = evaluation["gap_closed"]["kl"]
    share = ", no gap to close" if closed is None else f", {closed:.1%} of the gap closed"
    return (
        f"perplexity {recovered['perplexity']:.2f} (teacher {models['teacher']['perplexity']:.2f}, pruned "
        f"{pruned['perplexity']:.2f}), KL to the teacher {recovered['kl']:.3f} (pruned {pruned['kl']:.3f}{share}), "
        f"agreement {recovered['agreement']:.1%} (pruned {pruned['agreement']:.1%})"
    )


def what_is_worse(evaluation: Mapping[str, Any]) -> str | None:
    """Say what training made worse while it brought the student nearer to its teacher; None for nothing.

    What ends beyond its error where the pruned student was, and on the far side of the teacher, counts: what only
    went back to the teacher's came nearer to it.
    """
    teacher, pruned, recovered = (evaluation["models"][name] for name in ("teacher", "pruned", "recovered"))
    if recovered["kl"] >= pruned["kl"]:
        return None
    average = evaluation["task_average"]
    if average and "recovered" in average["retention"]:
        before, after = (average["retention"][name] for name in ("pruned", "recovered"))
        error = ((before["stderr"] or 0.0) ** 2 + (after["stderr"] or 0.0) ** 2) ** 0.5
        if before["value"] - after["value"] > error and after["value"] < 1:
            return f"retention fell from {before['value']:.1%} to {after['value']:.1%}"
    gain = evaluation["gains"].get("perplexity") or {"value": pruned["perplexity"] - recovered["perplexity"]}
    rise = Estimate(-gain["value"], gain.get("stderr"))
    if is_above_zero(rise) and recovered["perplexity"] > teacher["perplexity"]:
        return f"perplexity rose from {pruned['perplexity']:.2f} to {recovered['perplexity']:.2f}"
    return None
