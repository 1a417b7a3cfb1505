"""Read a recipe's student and results, and say what to try next, why, and by which commands. Loads no model."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coldstill.cache.errors import StoreNotFoundError
from coldstill.pipeline.judging.results import Retention, describe_results, read_evaluation, retention_of, what_is_worse
from coldstill.pipeline.judging.suggestions import MODEST, Advice, Measured, Settings, advise_next, as_override
from coldstill.pipeline.models import load_config, resolve_folder, text_config
from coldstill.pipeline.recipe.presets import Cut, cut_of, preset_values
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.runtime.errors import ModelError, RecipeError
from coldstill.pipeline.stage_two.run_folder import check_run, claimed_run, read_metrics, what_is_untrained
from coldstill.pipeline.students.folders import find_student
from coldstill.pipeline.students.pruning_record import describe_cut, read_pruning, was_cut

# Below this share of the teacher's parameters a cut is called aggressive: a rule of thumb.
_AGGRESSIVE_SHARE = 0.6
_DEFAULT_EPOCHS = 3.0  # of transformers' TrainingArguments
# What a change is called in the name of its output; a kind by its own name, and None for what follows from another.
_LABELS = {
    "loss.alpha": "alpha",
    "loss.gamma": "gamma",
    "loss.hidden": "",
    "train.num_train_epochs": "epochs",
    "train.max_steps": "steps",
    "data.train.max_rows": "rows",
    "targets.hidden.blocks": None,
}


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
    """Give the next step of a recipe's recovery.

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
    cut, description = _what_was_cut(recipe, folder, pruning)
    read = {"student": description}
    check_run(recipe)
    metrics = read_metrics(recipe)
    if metrics is None:
        if claimed_run(recipe) is None:
            return _start(recipe, cut, pruning, read, arguments)
        # A preset now would be another run, which this output refuses.
        reason = what_is_untrained(recipe) or "training was cut off before it said that it was complete"
        commands = [_line(stage, arguments, {}) for stage in ("train", "evaluate")]
        return NextStep(cut, read, None, "train", reason.partition("; run:")[0], {}, _task_notes(recipe), commands)
    evaluation = read_evaluation(recipe)
    if evaluation is None:
        reason = "the student is trained and was not evaluated since"
        command = _line("evaluate", arguments, {})
        return NextStep(cut, read, None, "evaluate", reason, {}, _task_notes(recipe), [command])
    read["results"] = describe_results(evaluation)
    retention = retention_of(evaluation)
    measured = _measured(recipe, evaluation, retention)
    settings = _settings(recipe, cut, metrics["log"])
    advice = advise_next(settings, measured, target=target)
    notes = list(advice.notes)
    if settings.rising and advice.step not in ("rows", "epochs", "done"):
        notes.append(f"{settings.rising}: more rows would help too, more epochs would not")
    notes += _start_notes(recipe) if advice.step != "done" else []
    if "loss.gamma" in advice.changes and recipe.targets.hidden.blocks == "none":
        advice = replace(advice, changes={**advice.changes, "targets.hidden.blocks": "mapped"})
    if "loss.gamma" in advice.changes and recipe.loss.schedule.gamma is not None:
        notes.append("loss.schedule moves gamma from there: change its end too")
    commands = _commands(recipe, advice, arguments)
    return NextStep(cut, read, retention, advice.step, advice.reason, dict(advice.changes), notes, commands)


def _line(command: str, arguments: Sequence[str], changes: Mapping[str, Any]) -> str:
    """Give the line that runs a command with changes, which replace what the command line said before."""
    file, *overrides = arguments
    kept = [override for override in overrides if override.partition("=")[0] not in changes]
    words = [*kept, *(as_override(key, value) for key, value in changes.items())]
    return shlex.join(["coldstill", command, file, *words])


def _student_folder(recipe: Recipe) -> Path | None:
    """Find the student, whose absence is no fault: it may not be made yet, or be on the hub."""
    try:
        return find_student(recipe)
    except (StoreNotFoundError, ModelError):
        return None


def _what_was_cut(recipe: Recipe, folder: Path | None, pruning: Mapping[str, Any] | None) -> tuple[Cut, str]:
    """Name what was cut, and say how it is known: by the student's record, the recipe, or both models' configs."""
    if pruning is not None:
        is_wide = was_cut(pruning, "mlp") or was_cut(pruning, "hidden")
        return cut_of(is_deep=was_cut(pruning, "blocks"), is_wide=is_wide), describe_cut(pruning)
    if recipe.student.prune is not None:
        cut = cut_of(is_deep=recipe.student.prune.is_deep, is_wide=recipe.student.prune.is_wide)
        return cut, f"{_in_words(cut)} is cut, by student.prune"
    try:
        teacher = resolve_folder(recipe.teacher.path, revision=recipe.teacher.revision, local_only=True)
        configs = [text_config(load_config(path)) for path in (teacher, folder) if path is not None]
    except ModelError:
        configs = []
    if len(configs) < 2:
        return "both", "what was cut is not known, and taken for depth and width"
    is_deep, is_wide, is_narrow = (
        getattr(configs[1], size) < getattr(configs[0], size)
        for size in ("num_hidden_layers", "hidden_size", "intermediate_size")
    )
    cut = cut_of(is_deep=is_deep, is_wide=is_wide or is_narrow)
    return cut, f"{_in_words(cut)} was cut, by the configs of both models"


def _in_words(cut: Cut) -> str:
    return "depth and width" if cut == "both" else cut


def _start(
    recipe: Recipe, cut: Cut, pruning: Mapping[str, Any] | None, read: dict[str, str], arguments: Sequence[str]
) -> NextStep:
    """Without results: the preset for that kind of cut, and the way to results."""
    parameters = pruning["parameters"] if pruning is not None else {"student": 1, "teacher": 1}
    is_aggressive = parameters["student"] < _AGGRESSIVE_SHARE * parameters["teacher"]
    name = f"{cut}_aggressive" if is_aggressive else cut
    share = f", of whose parameters less than {_AGGRESSIVE_SHARE:.0%} are left" if is_aggressive else ""
    reason = f"no results yet; preset {name} is the one for a student cut in {_in_words(cut)}{share}"
    has_preset = recipe.preset in (name, name.replace(cut, "auto"))
    changes = {} if has_preset else {"preset": name}
    notes = [*_task_notes(recipe), *_start_notes(recipe)]
    if has_preset or recipe.preset is None:
        loss = {key: getattr(recipe.loss, key) for key in recipe.loss.model_fields_set}
        own = _flat({"loss": loss, "train": recipe.train})
        wanted = _flat(preset_values(cut, is_aggressive=is_aggressive))
        other = [
            f"{key}={own[key]:g} (preset: {wanted[key]:g})"
            for key in wanted
            if own.get(key, wanted[key]) != wanted[key]
        ]
        notes += [f"what the recipe says itself stays: {', '.join(other)}"] if other else []
    commands = [_line(stage, arguments, changes) for stage in ("plan", "precompute", "train", "evaluate")]
    return NextStep(cut, read, None, "start", reason, changes, notes, commands)


def _flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


def _task_notes(recipe: Recipe) -> list[str]:
    if recipe.evaluate.tasks:
        return []
    return ["name evaluate.tasks to measure retention; without tasks agreement with the teacher stands in for it"]


def _start_notes(recipe: Recipe) -> list[str]:
    """Note a better start for training that the recipe neither takes nor refuses."""
    section = recipe.student.prune
    if section is None or section.reconstruct != "auto" or section.wants_reconstruction:
        return []
    return [
        "blocks are only removed; with student.prune.reconstruct=true what the others write is fitted to the teacher's "
        "stream, which is a better start"
    ]


def _measured(recipe: Recipe, evaluation: Mapping[str, Any], retention: Retention) -> Measured:
    questions = [task["num_samples"] for task in evaluation["tasks"].values() if task["higher_is_better"]]
    return Measured(
        retention.value,
        retention.stderr,
        is_proxy=retention.measure == "agreement",
        num_samples=min(questions, default=0),
        all_samples=recipe.evaluate.limit is None,
        worse=what_is_worse(evaluation),
    )


def _settings(recipe: Recipe, cut: Cut, log: Sequence[Mapping[str, Any]]) -> Settings:
    return Settings(
        cut=cut,
        alpha=recipe.loss.alpha,
        gamma=recipe.loss.gamma,
        hidden=recipe.loss.hidden,
        num_epochs=float(recipe.train.get("num_train_epochs", _DEFAULT_EPOCHS)),
        max_steps=int(recipe.train.get("max_steps", -1)),
        max_rows=recipe.data.train.max_rows,
        seen_epochs=max((entry["epoch"] for entry in log if "epoch" in entry), default=None),
        hidden_share=_hidden_share(recipe, log),
        rising=_overfitting(log),
    )


def _hidden_share(recipe: Recipe, log: Sequence[Mapping[str, Any]]) -> float | None:
    """Give what the weighted hidden loss made up of the loss when it was logged last; None where it never was."""
    logged = [entry for entry in log if "loss_hidden" in entry and entry.get("loss", 0) > 0]
    if not logged:
        return None
    last = logged[-1]
    return float(last.get("gamma", recipe.loss.gamma) * last["loss_hidden"] / last["loss"])


def _overfitting(log: Sequence[Mapping[str, Any]]) -> str | None:
    """Say that the eval loss had begun to rise: then more of the same rows is not what is missing."""
    losses = [(entry["eval_loss"], entry["step"]) for entry in log if "eval_loss" in entry]
    if not losses or min(losses)[1] == losses[-1][1]:
        return None
    least, step = min(losses)
    return f"eval_loss was least at step {step}, {least:.4f}, and {losses[-1][0]:.4f} at the end"


def _commands(recipe: Recipe, advice: Advice, arguments: Sequence[str]) -> list[str]:
    if not advice.changes:
        return []
    if advice.step == "samples":
        return [_line("evaluate", arguments, advice.changes)]
    changes = {**advice.changes, "output": _output(recipe.output, advice.changes)}
    needs_states = "loss.gamma" in advice.changes and not recipe.loss.needs_hidden
    stages = ["precompute"] * (needs_states or advice.step == "rows") + ["train", "evaluate"]
    return [_line(stage, arguments, changes) for stage in stages]


def _output(output: str, changes: Mapping[str, Any]) -> str:
    """Name the next output after its changes; an earlier value of the same key gives way."""
    for key, value in changes.items():
        label = _LABELS[key]
        if label is None:
            continue
        text = f"{value:g}" if isinstance(value, float) else str(value)
        output = re.sub(rf"-{label}\d[\d.]*(?=-|$)", "", output) if label else output.replace(f"-{text}", "")
        output += f"-{label}{text}"
    return output
