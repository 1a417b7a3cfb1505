"""The README.md beside an exported student: what it is, and from which teacher, store and rows it learned."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from pipeline.config import Recipe

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
    loss = recipe.loss
    facts = {
        "teacher": f"{name}, {teacher['architecture']} in {identity['dtype']}",
        "teacher's weights": f"sha256 `{identity['weights']}`",
        "teacher's config": f"sha256 `{identity['config']}`",
        "store": f"`{store}`",
        **{f"{split} rows": f"selection `{selection}`" for split, selection in sorted(selections.items())},
        "loss": (
            f"{loss.alpha:g} · cross entropy + {loss.beta:g} · KL at T = {loss.temperature:g} "
            f"+ {loss.gamma:g} · hidden ({loss.hidden})"
        ),
    }
    table = "\n".join(f"| {fact} | {value} |" for fact, value in facts.items())
    return (
        f"---\n{data.to_yaml()}\n---\n\n# Student of {Path(name).name}\n\n"
        "Trained by Coldstill from cached teacher activations. "
        "`recipe.yaml` is the whole recipe, `provenance.json` says with what it was made.\n\n"
        f"| | |\n|---|---|\n{table}\n"
    )
