"""Read a recipe's student and results, and say what to try next, why, and by which commands. Loads no model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coldstill.cache.errors import StoreNotFoundError
from coldstill.pipeline.judging.command_lines import command_line, commands_of
from coldstill.pipeline.judging.results import Retention, describe_results, read_evaluation, retention_of
from coldstill.pipeline.judging.run_figures import measured_of, settings_of
from coldstill.pipeline.judging.suggestions import MODEST, advise_next
from coldstill.pipeline.judging.what_was_cut import in_words, what_was_cut
from coldstill.pipeline.recipe.presets import Cut, preset_values
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.runtime.errors import ModelError, RecipeError
from coldstill.pipeline.stage_two.run_folder import check_run, claimed_run, read_metrics, what_is_untrained
from coldstill.pipeline.students.folders import find_student
from coldstill.pipeline.students.pruning_record import read_pruning


@dataclass(frozen=True)
class NextStep:
    """What to do next.

    Attributes:
        cut: What was cut of the student.
        read: What the advice goes by: `student` and, where there are any, `results`.
        retention: None where there are no results.
        step: `start`, `train`, `evaluate`, or a step of `coldstill.pipeline.judging.suggestions`.
        reason: Why.
        changes: Keys of the recipe, with their new values.
        notes: What else there is to know.
        commands: What to run, in this order.
    """

    cut: Cut
    read: dict[str, str]
    retention: Retention | None
    step: str
    reason: str
    changes: dict[str, Any]
    notes: list[str]
    commands: list[str]


def advise(recipe: Recipe, *, arguments: Sequence[str], target: float = MODEST) -> NextStep:
    """Return the next step of a recipe's recovery.

    Args:
        recipe: The recipe.
        arguments: What it was loaded from, for the commands: its file, and the changes to it.
        target: The retention that is wanted.

    Raises:
        RecipeError: The output holds another recipe's run, or the target is no share.
    """
    if not 0 < target <= 1:
        raise RecipeError(f"--target must be above 0 and at most 1, the share of the teacher's ability, got {target:g}")
    folder = _student_folder(recipe)
    pruning = read_pruning(folder) if folder else None
    cut, description = what_was_cut(recipe, folder, pruning)
    read = {"student": description}
    check_run(recipe)
    metrics = read_metrics(recipe)
    if metrics is None:
        if claimed_run(recipe) is None:
            return _start(recipe, cut, read, arguments)
        # A preset now would be another run, which this output refuses.
        reason = what_is_untrained(recipe) or "training was cut off before it said that it was complete"
        commands = [command_line(stage, arguments, {}) for stage in ("train", "evaluate")]
        return NextStep(cut, read, None, "train", reason.partition("; run:")[0], {}, _task_notes(recipe), commands)
    evaluation = read_evaluation(recipe)
    if evaluation is None:
        reason = "the student is trained and was not evaluated since"
        command = command_line("evaluate", arguments, {})
        return NextStep(cut, read, None, "evaluate", reason, {}, _task_notes(recipe), [command])
    read["results"] = describe_results(evaluation)
    retention = retention_of(evaluation)
    measured = measured_of(recipe, evaluation, retention)
    settings = settings_of(recipe, cut, metrics["log"])
    advice = advise_next(settings, measured, target=target)
    notes = list(advice.notes)
    if settings.rising and advice.step not in ("rows", "epochs", "done"):
        notes.append(f"{settings.rising}: more rows would help too, more epochs would not")
    if "loss.gamma" in advice.changes and recipe.targets.hidden.blocks == "none":
        advice = replace(advice, changes={**advice.changes, "targets.hidden.blocks": "mapped"})
    if "loss.gamma" in advice.changes and recipe.loss.schedule.gamma is not None:
        notes.append("loss.schedule moves gamma from there: change its end too")
    commands = commands_of(recipe, advice, arguments)
    return NextStep(cut, read, retention, advice.step, advice.reason, dict(advice.changes), notes, commands)


def _student_folder(recipe: Recipe) -> Path | None:
    """Find the student, whose absence is no fault: it may not be made yet, or be on the hub."""
    try:
        return find_student(recipe)
    except (StoreNotFoundError, ModelError):
        return None


def _start(recipe: Recipe, cut: Cut, read: dict[str, str], arguments: Sequence[str]) -> NextStep:
    """Without results: the preset for that kind of cut, and the way to results."""
    reason = f"no results yet; preset {cut} is the one for a student cut in {in_words(cut)}"
    has_preset = recipe.preset in (cut, "auto")
    changes = {} if has_preset else {"preset": cut}
    notes = _task_notes(recipe)
    if has_preset or recipe.preset is None:
        loss = {key: getattr(recipe.loss, key) for key in recipe.loss.model_fields_set}
        own = _flat({"loss": loss, "train": recipe.train})
        wanted = _flat(_preset_values(recipe, cut))
        other = [
            f"{key}={own[key]:g} (preset: {wanted[key]:g})"
            for key in wanted
            if own.get(key, wanted[key]) != wanted[key]
        ]
        notes += [f"what the recipe says itself stays: {', '.join(other)}"] if other else []
    commands = [command_line(stage, arguments, changes) for stage in ("plan", "precompute", "train", "evaluate")]
    return NextStep(cut, read, None, "start", reason, changes, notes, commands)


def _preset_values(recipe: Recipe, cut: Cut) -> Mapping[str, Mapping[str, Any]]:
    student = recipe.student
    narrows_stream = cut != "depth" and (student.prune is None or student.narrows_stream)
    return preset_values(cut, cut, has_adapters=student.lora is not None, narrows_stream=narrows_stream)


def _flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


def _task_notes(recipe: Recipe) -> list[str]:
    if recipe.evaluate.tasks:
        return []
    return ["name evaluate.tasks to measure retention; without tasks agreement with the teacher stands in for it"]
