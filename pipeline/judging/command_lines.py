"""A change of a recipe as the commands that try it, and the name of the output that they write to."""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from coldstill.pipeline.judging.suggestions import Advice, as_override
from coldstill.pipeline.recipe.sections import Recipe

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


def command_line(command: str, arguments: Sequence[str], changes: Mapping[str, Any]) -> str:
    """Return the line that runs a command with changes, which replace what the command line said before."""
    file, *overrides = arguments
    kept = [override for override in overrides if override.partition("=")[0] not in changes]
    words = [*kept, *(as_override(key, value) for key, value in changes.items())]
    return shlex.join(["coldstill", command, file, *words])


def commands_of(recipe: Recipe, advice: Advice, arguments: Sequence[str]) -> list[str]:
    """List the lines that carry advice out, in this order; none where it changes nothing.

    Args:
        recipe: The recipe that the advice is for.
        advice: What to change.
        arguments: What the recipe was loaded from: its file, and the changes to it.
    """
    if not advice.changes:
        return []
    if advice.step == "samples":
        return [command_line("evaluate", arguments, advice.changes)]
    changes = {**advice.changes, "output": _output(recipe.output, advice.changes)}
    needs_states = "loss.gamma" in advice.changes and not recipe.loss.needs_hidden
    stages = ["precompute"] * (needs_states or advice.step == "rows") + ["train", "evaluate"]
    return [command_line(stage, arguments, changes) for stage in stages]


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
