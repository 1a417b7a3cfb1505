"""The README.md beside an exported student: what it is, how it was cut and trained, and what it recovered.

The whole card is built from records each time, so that another evaluation replaces the numbers of the last.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from coldstill.pipeline.losses.objective import Objective
from coldstill.pipeline.outputs.provenance import RECIPE_FILE
from coldstill.pipeline.outputs.retention import NO_GAP, NO_GAP_REASON
from coldstill.pipeline.outputs.run_index import RunRows, trained_student
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.recipe.loss import LossConfig
from coldstill.pipeline.recipe.sections import LogitsTargetConfig, Recipe
from coldstill.pipeline.runtime.whole import write_whole
from coldstill.pipeline.students.pruning_record import describe_cut, read_pruning

CARD_FILE = "README.md"

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_RECOVERY = "## Recovery"
_MEASURES = {
    "perplexity": ("perplexity", ",.2f"),
    "kl": ("KL to the teacher (nats)", ".4f"),
    "agreement": ("top-1 agreement with the teacher", ".1%"),
}


def model_card(recipe: Recipe, run: RunRows, pruned: Path, evaluation: Mapping[str, Any] | None = None) -> str:
    """Return the card's text.

    Args:
        recipe: What trained the student.
        run: The rows that it learned from, in the teacher's store.
        pruned: The folder of the student before training.
        evaluation: What was measured of teacher, pruned and recovered student, as a map; None before it is.
    """
    teacher = run.store.teacher
    name = str(teacher["name"])
    is_on_hub = bool(_HUB_NAME.fullmatch(name)) and not Path(name).exists()
    title = f"Student of {Path(name).name}"
    scores = _eval_results(evaluation) if evaluation is not None else []
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=name if is_on_hub else None,
        tags=["distillation", "pruning", "coldstill"],
        model_name=title if scores else None,
        eval_results=scores or None,
    )
    pruning = read_pruning(pruned)
    facts = {
        "teacher": f"{name}, {teacher['architecture']} in {teacher['identity']['dtype']}",
        "teacher's weights": f"sha256 `{teacher['identity']['weights']}`",
        "teacher's config": f"sha256 `{teacher['identity']['config']}`",
        **({} if pruning is None else {"student": describe_cut(pruning)}),
        "store": f"`{run.store.name}`",
        **{f"{split} rows": f"selection `{rows.name}`" for split, rows in sorted(run.selections.items())},
        "loss": _loss(recipe.loss, recipe.targets.logits),
    }
    table = "\n".join(f"| {fact} | {value} |" for fact, value in facts.items())
    recovery = "" if evaluation is None else "\n".join(["", _RECOVERY, "", *_recovery(evaluation), ""])
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n"
        "Trained by Coldstill from cached teacher activations. "
        "`recipe.yaml` is the whole recipe, `provenance.json` says with what it was made.\n\n"
        f"| | |\n|---|---|\n{table}\n{recovery}"
    )


def update_card(recipe: Recipe, run: RunRows, pruned: Path, evaluation: Mapping[str, Any]) -> None:
    """Write the card beside the recipe's trained student again, with what was measured of it."""
    student = trained_student(recipe)
    write_whole(student / CARD_FILE, model_card(load_recipe(student / RECIPE_FILE), run, pruned, evaluation))


def has_numbers(student: Path) -> bool:
    """Whether the card beside a student says what it recovered."""
    card = student / CARD_FILE
    return card.is_file() and f"\n{_RECOVERY}\n" in card.read_text()


def _eval_results(evaluation: Mapping[str, Any]) -> list[EvalResult]:
    """Return the student's score of each task as the hub's metadata has it."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=name,
            metric_type=task["metric"],
            metric_value=round(task["models"]["recovered"]["value"], 6),
            metric_args={"num_samples": task["num_samples"], "stderr": task["models"]["recovered"]["stderr"]},
        )
        for name, task in evaluation["tasks"].items()
    ]


def _recovery(evaluation: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the recovery table and what its columns mean."""
    models = ("teacher", "pruned", "recovered")
    yield f"| | {' | '.join(models)} | retention | gap closed |"
    yield "|---|---|---|---|---|---|"
    for measure, (title, form) in _MEASURES.items():
        values = [format(evaluation["models"][name][measure], form) for name in models]
        closed = evaluation["gap_closed"][measure]
        yield f"| {title} | {' | '.join(values)} | - | {NO_GAP if closed is None else format(closed, '.1%')} |"
    for name, task in evaluation["tasks"].items():
        yield f"| {name}, {task['metric']} | {_estimates(task)} |"
    average = evaluation["task_average"]
    counted = sum(task["higher_is_better"] for task in evaluation["tasks"].values())
    if average is not None and counted > 1:
        yield f"| average of {counted} tasks | {_estimates(average)} |"
    yield ""
    yield (
        f"Over {evaluation['num_tokens']:,} tokens of held-out text. Gap closed is (recovered - pruned) / (teacher - "
        "pruned)."
    )
    compared = [*evaluation["tasks"].values(), *([average] if average is not None and counted > 1 else [])]
    shares = [evaluation["gap_closed"][measure] for measure in _MEASURES]
    if None in [*shares, *(found["gap_closed"] for found in compared)]:
        yield f"{NO_GAP_REASON[0].upper()}{NO_GAP_REASON[1:]}."
    if evaluation["tasks"]:
        counts = sorted({task["num_samples"] for task in evaluation["tasks"].values()})
        questions = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
        yield (
            f"Tasks are those of lm-evaluation-harness, {questions} questions each; ± is one standard error; retention "
            "is recovered / teacher."
        )


def _estimates(compared: Mapping[str, Any]) -> str:
    """Return the cells of a task, or of the average: three models, retention, gap closed."""
    models = [compared["models"][name] for name in ("teacher", "pruned", "recovered")]
    form = ".1%" if all(0 <= model["value"] <= 1 for model in models) else ",.2f"
    cells = [_cell(model, form) for model in models]
    closed = compared["gap_closed"]
    cells += [
        _cell(compared["retention"].get("recovered"), ".1%"),
        NO_GAP if closed is None else _cell(closed, ".1%"),
    ]
    return " | ".join(cells)


def _cell(estimate: Mapping[str, float | None] | None, form: str) -> str:
    if estimate is None:
        return "-"
    error = estimate["stderr"]
    return f"{estimate['value']:{form}}" + ("" if error is None else f" ± {error:{form}}")


def _loss(loss: LossConfig, logits: LogitsTargetConfig) -> str:
    """Name each term of the loss, with its weight."""
    to_logits = f" to {_target(logits)} at T = {_course(loss, 'temperature')}"
    objective = Objective.of(loss)
    terms = " + ".join(
        f"{_course(loss, term.weight_key)} · {term.summary}{to_logits if 'logits' in term.targets else ''}"
        for term in objective.terms
    )
    return f"{terms}, weighed by gradient" if objective.is_balanced else terms


def _course(loss: LossConfig, name: str) -> str:
    """Return a value of the loss, and where it goes over the run."""
    start, schedule = f"{getattr(loss, name):g}", getattr(loss.schedule, name)
    return start if schedule is None or schedule.end is None else f"({start} to {schedule.end:g}, {schedule.shape})"


def _target(logits: LogitsTargetConfig) -> str:
    details = {
        "topk": f"k = {logits.k}",
        "topk_sampled": f"k = {logits.k}, {logits.samples} draws",
        "final": logits.encoding + (f", step {logits.step:g}" if logits.encoding == "coded" else ""),
    }
    return f"{logits.kind} ({details[logits.kind]})" if logits.kind in details else logits.kind
