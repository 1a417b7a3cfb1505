"""A run's recipe, log and evaluation as the figures that suggestions go by."""

from collections.abc import Mapping, Sequence
from typing import Any

from coldstill.pipeline.judging.results import Retention, what_is_worse
from coldstill.pipeline.judging.suggestions import Measured, Settings
from coldstill.pipeline.recipe.presets import Cut
from coldstill.pipeline.recipe.sections import Recipe

_DEFAULT_EPOCHS = 3.0  # of transformers' TrainingArguments


def measured_of(recipe: Recipe, evaluation: Mapping[str, Any], retention: Retention) -> Measured:
    """Return how good the trained student is, and how sure that is."""
    questions = [task["num_samples"] for task in evaluation["tasks"].values() if task["higher_is_better"]]
    return Measured(
        retention.value,
        retention.stderr,
        is_proxy=retention.measure == "agreement",
        num_samples=min(questions, default=0),
        all_samples=recipe.evaluate.limit is None,
        worse=what_is_worse(evaluation),
    )


def settings_of(recipe: Recipe, cut: Cut, log: Sequence[Mapping[str, Any]]) -> Settings:
    """Return how the student was cut and trained, by the recipe and by what training logged."""
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
    """Return what the weighted hidden loss made up of the loss when it was logged last; None where it never was."""
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
