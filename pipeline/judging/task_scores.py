"""The models of a run on its recipe's tasks: each score once, kept by content beside the stores, then side by side.

A sweep's runs share teacher and pruned student, so theirs are computed in the first run and found in all others; where
the teacher's scores are found, its files need not be there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from coldstill.cache.errors import IdentityError
from coldstill.cache.index import kept_entry, write_entry
from coldstill.pipeline.judging.tasks import LoadedTask, TaskScore, answer, harness_version
from coldstill.pipeline.models import identify, load_config, load_model, load_tokenizer, resolve_device
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.outputs.retention import (
    Estimate,
    Matrix,
    average_covariance,
    covariance_of,
    covariance_of_means,
    gap_closed,
    independent,
    retention,
)
from coldstill.pipeline.outputs.run_index import RunRows
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.rows.building import tokenizer_digest
from coldstill.pipeline.runtime.errors import ModelError, RecipeError
from coldstill.pipeline.runtime.units import format_size

_STUDENT_DTYPE = "float32"


@dataclass(frozen=True)
class TaskComparison:
    """The models of a run on one task.

    Attributes:
        metric: What values are.
        higher_is_better: Of that metric.
        num_samples: Questions.
        models: `teacher`, `pruned` and, once it is trained, `recovered`.
        retention: By student, its value / the teacher's; empty where a lower value is better.
        gap_closed: (recovered - pruned) / (teacher - pruned); None before training, and where pruning opened no gap.
    """

    metric: str
    higher_is_better: bool
    num_samples: int
    models: dict[str, Estimate]
    retention: dict[str, Estimate]
    gap_closed: Estimate | None


@dataclass(frozen=True)
class TaskAverage:
    """The models' mean scores over the tasks where a higher value is better, each task weighing the same.

    Retention and gap closed are those of the mean scores: a mean of the tasks' own shares would be decided by
    whichever task has hardly a gap.
    """

    models: dict[str, Estimate]
    retention: dict[str, Estimate]
    gap_closed: Estimate | None


def compare_on_tasks(
    recipe: Recipe, run: RunRows, folders: Mapping[str, Path], tasks: Sequence[LoadedTask], *, show_progress: bool
) -> tuple[dict[str, TaskComparison], TaskAverage | None]:
    """Ask the teacher and the students in folders what was not asked of them yet, and compare.

    Raises:
        ModelError: A model is needed and cannot be loaded.
        IdentityError: The teacher that is there is not the one of the store.
        RecipeError: It would have to stream in for every few questions.
    """
    models = [_teacher(recipe, run), *(_student(recipe, folder, name) for name, folder in folders.items())]
    scores = {model.name: _scores(recipe, model, tasks, show_progress=show_progress) for model in models}
    comparisons, covariances = {}, {}
    for task in tasks:
        comparisons[task.name], covariances[task.name] = _compare({name: scores[name][task.name] for name in scores})
    return comparisons, _average(comparisons, covariances)


@dataclass(frozen=True)
class _AskedModel:
    """A model that tasks are asked of: what it is by content, and how to load it and its tokenizer."""

    name: str
    identity: dict[str, str]
    load: Callable[[], tuple[Any, Any]]


def _teacher(recipe: Recipe, run: RunRows) -> _AskedModel:
    stored = run.store.teacher["identity"]
    tokenizer = str(run.selections["eval"].provenance["tokenizer"])

    def load() -> tuple[Any, Any]:
        try:
            teacher = Teacher.locate(recipe.teacher)
        except ModelError as error:
            raise ModelError(
                f"not all of evaluate.tasks were asked of this teacher yet, now it is gone: {error}"
            ) from None
        now = {**teacher.identity, "tokenizer": tokenizer_digest(teacher.tokenizer)}
        for part, there in {**stored, "tokenizer": tokenizer}.items():
            if now[part] != there:
                raise IdentityError(
                    f"store {run.store.path} was made with another teacher than {recipe.teacher.path}: {part} "
                    f"{there[:12]} there, {now[part][:12]} now; run: coldstill precompute"
                )
        if teacher.placement == "streamed":
            raise RecipeError(
                f"evaluate.tasks are asked of the teacher too, and teacher.placement {recipe.teacher.placement} would "
                f"read its {format_size(teacher.weights.total)} of weights for every few questions: evaluate with "
                "teacher.placement=whole where they fit into memory, or with evaluate.tasks=[]"
            )
        trust = recipe.teacher.trust_remote_code
        # Quantised weights stay where they are read to.
        device = None if teacher.quantisation is None else resolve_device(recipe.evaluate.device)
        model = load_model(teacher.folder, dtype=teacher.dtype, trust_remote_code=trust, device=device)
        return model, teacher.tokenizer

    return _AskedModel("teacher", {**stored, "tokenizer": tokenizer}, load)


def _student(recipe: Recipe, folder: Path, name: str) -> _AskedModel:
    trust = recipe.student.trust_remote_code
    config = load_config(folder, trust_remote_code=trust)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust)
    identity = {**identify(folder, config, dtype=_STUDENT_DTYPE), "tokenizer": tokenizer_digest(tokenizer)}

    def load() -> tuple[Any, Any]:
        return load_model(folder, dtype=_STUDENT_DTYPE, trust_remote_code=trust), tokenizer

    return _AskedModel(name, identity, load)


def _scores(
    recipe: Recipe, asked: _AskedModel, tasks: Sequence[LoadedTask], *, show_progress: bool
) -> dict[str, TaskScore]:
    """Return a model's scores by task: those that are kept, and those of the tasks that it is asked now."""
    keys = {task.name: {"model": asked.identity, "task": task.content, "lm_eval": harness_version()} for task in tasks}
    kept = {name: kept_entry(recipe.cache, "tasks", key) for name, key in keys.items()}
    scores = {name: TaskScore(**entry) for name, entry in kept.items() if entry is not None}
    missing = [task for task in tasks if task.name not in scores]
    if missing:
        model, tokenizer = asked.load()
        model = model.to(resolve_device(recipe.evaluate.device))
        for task in missing:
            score = answer(model, tokenizer, task, recipe.evaluate, show_progress=show_progress)
            write_entry(recipe.cache, "tasks", keys[task.name], asdict(score))
            scores[task.name] = score
    return scores


def _compare(scores: Mapping[str, TaskScore]) -> tuple[TaskComparison, Matrix | None]:
    """Put the models' scores of one task side by side; with it the covariances of their values, in their order."""
    samples = [score.samples for score in scores.values() if score.samples is not None]
    is_paired = len(samples) == len(scores)
    covariance = covariance_of_means(samples) if is_paired else independent([s.stderr for s in scores.values()])
    first = next(iter(scores.values()))
    models = {name: Estimate(score.value, score.stderr) for name, score in scores.items()}
    values = [estimate.value for estimate in models.values()]
    kept, closed = _shares(list(models), values, covariance, higher_is_better=first.higher_is_better)
    return TaskComparison(first.metric, first.higher_is_better, first.num_samples, models, kept, closed), covariance


def _average(comparisons: Mapping[str, TaskComparison], covariances: Mapping[str, Matrix | None]) -> TaskAverage | None:
    counted = [name for name, comparison in comparisons.items() if comparison.higher_is_better]
    if not counted:
        return None
    covariance = average_covariance([covariances[name] for name in counted])
    names = list(comparisons[counted[0]].models)
    values = [fmean(comparisons[task].models[name].value for task in counted) for name in names]
    stderrs = [None if covariance is None else covariance[place][place] ** 0.5 for place in range(len(names))]
    models = {name: Estimate(value, stderr) for name, value, stderr in zip(names, values, stderrs, strict=True)}
    return TaskAverage(models, *_shares(names, values, covariance, higher_is_better=True))


def _shares(
    names: Sequence[str], values: Sequence[float], covariance: Matrix | None, *, higher_is_better: bool
) -> tuple[dict[str, Estimate], Estimate | None]:
    """Return each student's retention, and the gap that training closed; the first model is the teacher."""
    kept = {}
    for place in range(1, len(names)) if higher_is_better else ():
        estimate = retention(values[place], values[0], covariance_of(covariance, (place, 0)))
        if estimate is not None:
            kept[names[place]] = estimate
    if len(names) < 3:
        return kept, None
    teacher, pruned, recovered = values
    return kept, gap_closed(teacher, pruned, recovered, covariance, higher_is_better=higher_is_better)
