"""What the evaluation of a trained student says, by its record: retention, in words, and what got worse."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pipeline.config import Recipe
from pipeline.provenance import PROVENANCE_FILE
from pipeline.run_index import trained_student


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


def read_evaluation(recipe: Recipe) -> dict[str, Any] | None:
    """Read the evaluation of the trained student; None where there is none, or the student is newer."""
    record = Path(recipe.output) / "evaluation" / PROVENANCE_FILE
    if not record.is_file():
        return None
    facts = json.loads(record.read_text())
    student = json.loads((trained_student(recipe) / PROVENANCE_FILE).read_text())
    written, trained = (datetime.fromisoformat(found["written_at"]) for found in (facts, student))
    return dict(facts["evaluation"]) if written >= trained and "recovered" in facts["evaluation"]["models"] else None


def retention_of(evaluation: Mapping[str, Any]) -> Retention:
    """Give what the student retains on tasks, or its agreement with the teacher where no task was evaluated."""
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
    share = "" if closed is None else f", {closed:.1%} of the gap closed"
    return (
        f"perplexity {recovered['perplexity']:.2f} (teacher {models['teacher']['perplexity']:.2f}, pruned "
        f"{pruned['perplexity']:.2f}), KL to the teacher {recovered['kl']:.3f} (pruned {pruned['kl']:.3f}{share}), "
        f"agreement {recovered['agreement']:.1%} (pruned {pruned['agreement']:.1%})"
    )


def what_is_worse(evaluation: Mapping[str, Any]) -> str | None:
    """Say what training made worse while it brought the student nearer to its teacher; None for nothing."""
    pruned, recovered = (evaluation["models"][name] for name in ("pruned", "recovered"))
    if recovered["kl"] >= pruned["kl"] and recovered["agreement"] <= pruned["agreement"]:
        return None
    average = evaluation["task_average"]
    if average and "recovered" in average["retention"]:
        before, after = (average["retention"][name] for name in ("pruned", "recovered"))
        error = ((before["stderr"] or 0.0) ** 2 + (after["stderr"] or 0.0) ** 2) ** 0.5
        if before["value"] - after["value"] > error:
            return f"retention fell from {before['value']:.1%} to {after['value']:.1%}"
    if recovered["perplexity"] > pruned["perplexity"]:
        return f"perplexity rose from {pruned['perplexity']:.2f} to {recovered['perplexity']:.2f}"
    return None
