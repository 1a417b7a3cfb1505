"""Tasks of EleutherAI's lm-evaluation-harness: found by name or file, told apart by content, asked of a model.

Knows `lm_eval`, which is imported where it is used; knows nothing of which models there are or where scores are kept.
"""

import contextlib
import difflib
import functools
import hashlib
import inspect
import io
import itertools
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from coldstill.cache.identity import digest_of
from coldstill.pipeline.recipe.sections import EvaluateConfig
from coldstill.pipeline.runtime.errors import RecipeError

# The metric that a task is judged by, where it has it; the first of its own where it has neither.
_MAIN_METRICS = ("acc_norm", "acc")
# Of metrics that are no mean, such as a perplexity.
_BOOTSTRAPS = 1000
# The harness's own seed of few-shot examples.
_FEWSHOT_SEED = 1234
# What of a task's configuration says where its questions are, and not what they are.
_ORIGIN = ("dataset_path", "dataset_name", "dataset_kwargs", "metadata")


@dataclass(frozen=True)
class LoadedTask:
    """A task with its questions.

    Attributes:
        name: Its name.
        task: The harness's own object.
        content: Digest of what is asked and how answers are judged; no path is part of it.
    """

    name: str
    task: Any
    content: str


@dataclass(frozen=True)
class TaskScore:
    """What a model scored.

    Attributes:
        metric: Its main metric: `acc_norm` where the task has it, else `acc`, else the task's first.
        higher_is_better: Of that metric.
        num_samples: Questions that were asked.
        value: The metric.
        stderr: Its standard error, by the harness; None where it gives none.
        samples: The metric of each question, in order, where it is the mean of these.
    """

    metric: str
    higher_is_better: bool
    num_samples: int
    value: float
    stderr: float | None
    samples: list[float] | None


def harness_version() -> str:
    """Return the version of lm-evaluation-harness.

    Raises:
        RecipeError: It is not installed.
    """
    try:
        return version("lm_eval")
    except PackageNotFoundError:
        raise RecipeError("evaluate.tasks needs lm-eval; run: pip install 'coldstill[lm-eval]'") from None


def load_tasks(section: EvaluateConfig) -> list[LoadedTask]:
    """Find a recipe's tasks and load their questions; groups and tags stand for the tasks in them.

    Raises:
        RecipeError: A task is unknown or named twice, a file is missing, or its questions cannot be loaded; one line.
    """
    if section.include_path is not None and not Path(section.include_path).is_dir():
        raise RecipeError(f"evaluate.include_path is {section.include_path}, which is no folder")
    harness_version()
    with _quiet():
        manager, specs = _find(section)
        tasks: dict[str, LoadedTask] = {}
        for entry, spec in specs.items():
            for name, task in _load(manager, entry, spec).items():
                if name in tasks:
                    raise RecipeError(f"evaluate.tasks names task {name!r} twice; {entry} has it too")
                tasks[name] = LoadedTask(name, task, _content(entry, task, section))
                if section.num_fewshot and _num_fewshot(task, section) == 0:
                    warnings.warn(f"evaluate.num_fewshot has no effect on {name}, which takes none", stacklevel=2)
        return list(tasks.values())


def answer(
    model: Any, tokenizer: Any, task: LoadedTask, section: EvaluateConfig, *, show_progress: bool = True
) -> TaskScore:
    """Let a model answer a task's questions, on the device that it is on."""
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    with _quiet(show_progress=show_progress):
        harness_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=section.batch_size)
        # As `simple_evaluate` does it, which also asks the hub for the model and lists the machine's packages.
        task.task.set_config("num_fewshot", _num_fewshot(task.task, section))
        task.task.set_fewshot_seed(_FEWSHOT_SEED)
        # Its bootstrap forks unless told otherwise, and this process holds a model.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        results = evaluate(
            lm=harness_model,
            task_dict={"tasks": {task.name: task.task}},
            limit=section.limit,
            bootstrap_iters=_BOOTSTRAPS,
        )
        return _score(results, task)


def _find(section: EvaluateConfig) -> tuple[Any, dict[str, str]]:
    """Return a task manager that knows all entries, and what it knows each of them by."""
    files = {entry: _task_file(entry, section.include_path) for entry in section.tasks if entry.endswith(".yaml")}
    names = [entry for entry in section.tasks if entry not in files]
    manager = _manager(section.include_path, include_defaults=False)
    names_groups = any(re.search(r"^group:", file.read_text(), re.MULTILINE) for file in files.values())
    if names_groups or any(name not in manager.task_index for name in names):
        # The harness reads some ten thousand files to know its own tasks.
        manager = _manager(section.include_path, include_defaults=True)
    for name in names:
        if name not in manager.task_index:
            where = f" and {section.include_path}" if section.include_path else ""
            raise RecipeError(
                f"evaluate.tasks: lm-eval {harness_version()}{where} has no task {name!r}"
                f"{_nearest(name, manager.all_tasks)}; a file of your own ends in .yaml"
            )
    return manager, {entry: str(files.get(entry, entry)) for entry in section.tasks}


@functools.cache
def _manager(include_path: str | None, *, include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=include_defaults)


def _task_file(entry: str, include_path: str | None) -> Path:
    folders = [Path(), *([Path(include_path)] if include_path else [])]
    for folder in folders:
        if (folder / entry).is_file():
            return folder / entry
    neighbours = [file.name for folder in folders for file in (folder / entry).parent.glob("*.yaml")]
    where = f", here or in {include_path}" if include_path else ""
    raise RecipeError(f"evaluate.tasks: no task file {entry}{where}{_nearest(Path(entry).name, neighbours)}")


def _nearest(name: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""


def _load(manager: Any, entry: str, spec: str) -> dict[str, Any]:
    # A task file is its user's program, which may fail in any way.
    try:
        tasks = dict(manager.load([spec])["tasks"])
    except Exception as error:
        raise RecipeError(f"evaluate.tasks: {entry} cannot be loaded: {_one_line(error)}") from error
    for task in tasks.values():
        if getattr(task, "MULTIMODAL", False):
            raise RecipeError(f"evaluate.tasks: {entry} shows images or plays sound; Coldstill's models read text")
        if getattr(task, "UNSAFE_CODE", False):
            raise RecipeError(f"evaluate.tasks: {entry} runs code that a model writes; lm-eval's own command does that")
    return tasks


def _content(entry: str, task: Any, section: EvaluateConfig) -> str:
    """Digest the questions, the examples before them, and how the task words and judges them."""
    num_fewshot = _num_fewshot(task, section)
    try:
        examples = list(task.fewshot_docs()) if num_fewshot else []
        questions = itertools.islice(task.eval_docs, section.limit)
        documents = hashlib.sha256()
        for document in itertools.chain(examples, [None], questions):
            documents.update(_canonical(document))
    except Exception as error:
        raise RecipeError(f"evaluate.tasks: {entry} gives no questions: {_one_line(error)}") from error
    config = task.config.to_dict(keep_callable=True)
    told = {key: value for key, value in config.items() if key not in _ORIGIN}
    return digest_of(
        {
            "config": _canonical(told).decode(),
            "version": str(task.VERSION),
            "num_fewshot": num_fewshot,
            "documents": documents.hexdigest(),
        }
    )


def _num_fewshot(task: Any, section: EvaluateConfig) -> int:
    """Return how many examples stand before each question; a task that wants none keeps to that, as in the harness."""
    own = task.get_config("num_fewshot")
    if own == 0 or section.num_fewshot is None:
        return int(own or 0)
    return section.num_fewshot


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=_source).encode()


def _source(value: Any) -> str:
    """Stand for what is no JSON: a function by the whole file that it is from, so that what it calls counts too."""
    if callable(value) and not isinstance(value, type):
        with contextlib.suppress(TypeError, OSError):
            return Path(inspect.getsourcefile(value) or "").read_text()
    return str(value)


def _score(results: Any, task: LoadedTask) -> TaskScore:
    from lm_eval.api.metrics import mean

    measured = results["results"][task.name]
    # `acc,none` and `acc_stderr,none`: a metric, and the filter that answers went through; the first filter counts.
    columns = [name.rpartition(",") for name in measured if "," in name and "_stderr," not in name]
    filters = {metric: answer_filter for metric, _, answer_filter in reversed(columns)}
    metric = next(name for name in (*_MAIN_METRICS, columns[0][0]) if name in filters)
    stderr = measured.get(f"{metric}_stderr,{filters[metric]}")
    answers = [sample for sample in results["samples"][task.name] if sample["filter"] == filters[metric]]
    is_mean = task.task.aggregation().get(metric) is mean and all(metric in sample for sample in answers)
    is_paired = is_mean and len(answers) > 1
    return TaskScore(
        metric=metric,
        higher_is_better=bool(results["higher_is_better"][task.name].get(metric, True)),
        num_samples=len(answers),
        value=float(measured[f"{metric},{filters[metric]}"]),
        stderr=None if isinstance(stderr, str | None) else float(stderr),
        samples=[float(sample[metric]) for sample in answers] if is_paired else None,
    )


@contextlib.contextmanager
def _quiet(*, show_progress: bool = True) -> Iterator[None]:
    """Keep standard output free of what the harness prints, and its notes on its own options from the screen."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr if show_progress else io.StringIO()))
            if not show_progress:
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    finally:
        logger.setLevel(level)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
