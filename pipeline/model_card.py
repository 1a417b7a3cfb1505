"""The README.md beside an exported student: what it is, and from which teacher, store and rows it learned."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from pipeline.config import LogitsTargetConfig, Recipe
from pipeline.divergences import DEFAULT_WEIGHTS
from pipeline.loss_config import LossConfig, LossWeight

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(recipe: Recipe, *, teacher: Mapping[str, Any], store: str, selections: Mapping[str, str]) -> str:
    """Give the card's text.

    Args:
        recipe: What trained the student.
        teacher: What the store says of its teacher.
        store: The store's name.
        selections: The name of each split's selection of rows in it.
    """
    name = str(teacher["name"])
    is_on_hub = bool(_HUB_NAME.fullmatch(name)) and not Path(name).exists()
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=name if is_on_hub else None,
        tags=["distillation", "pruning", "coldstill"],
    )
    identity = teacher["identity"]
    facts = {
        "teacher": f"{name}, {teacher['architecture']} in {identity['dtype']}",
        "teacher's weights": f"sha256 `{identity['weights']}`",
        "teacher's config": f"sha256 `{identity['config']}`",
        "store": f"`{store}`",
        **{f"{split} rows": f"selection `{selection}`" for split, selection in sorted(selections.items())},
        "loss": _loss(recipe.loss, recipe.targets.logits),
    }
    table = "\n".join(f"| {fact} | {value} |" for fact, value in facts.items())
    return (
        f"---\n{data.to_yaml()}\n---\n\n# Student of {Path(name).name}\n\n"
        "Trained by Coldstill from cached teacher activations. "
        "`recipe.yaml` is the whole recipe, `provenance.json` says with what it was made.\n\n"
        f"| | |\n|---|---|\n{table}\n"
    )


def _loss(loss: LossConfig, logits: LogitsTargetConfig) -> str:
    """Name each term of the loss that counts, with its weight."""
    terms: dict[LossWeight, str] = {
        "alpha": "cross entropy",
        "beta": f"{_divergence(loss)} to {_target(logits)} at T = {_course(loss, 'temperature')}",
        "gamma": f"hidden ({loss.hidden})",
        "delta": f"dynamics ({loss.dynamics})",
    }
    return " + ".join(f"{_course(loss, weight)} · {term}" for weight, term in terms.items() if loss.ever(weight))


def _course(loss: LossConfig, name: str) -> str:
    """Give a value of the loss, and where it goes over the run."""
    start, schedule = f"{getattr(loss, name):g}", getattr(loss.schedule, name)
    return start if schedule is None or schedule.end is None else f"({start} to {schedule.end:g}, {schedule.shape})"


def _divergence(loss: LossConfig) -> str:
    if loss.divergence == "selective":
        return f"selective (k = {loss.selective_k}, entropy above {loss.selective_entropy:g})"
    if loss.divergence not in DEFAULT_WEIGHTS:
        return loss.divergence
    weight = DEFAULT_WEIGHTS[loss.divergence] if loss.divergence_weight is None else loss.divergence_weight
    return f"{loss.divergence} (weight {weight:g})"


def _target(logits: LogitsTargetConfig) -> str:
    details = {
        "topk": f"k = {logits.k}",
        "topk_sampled": f"k = {logits.k}, {logits.samples} draws",
        "final": logits.encoding + (f", step {logits.step:g}" if logits.encoding == "coded" else ""),
    }
    return f"{logits.kind} ({details[logits.kind]})" if logits.kind in details else logits.kind
