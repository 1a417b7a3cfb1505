"""Presets: the loss and the training that fit what was cut, as defaults behind what a recipe says itself.

Knows plain maps only: a preset is written into a recipe before the recipe is checked, so that the resolved recipe says
every value and needs no preset to mean the same.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

Cut = Literal["depth", "width", "both"]
PresetName = Literal[
    "auto", "depth", "width", "both", "auto_aggressive", "depth_aggressive", "width_aggressive", "both_aggressive"
]

_AGGRESSIVE = "_aggressive"
_WEIGHTS: Mapping[Cut, Mapping[str, float]] = {
    "depth": {"alpha": 0.5, "beta": 0.5, "gamma": 0.1},
    "width": {"alpha": 0.4, "beta": 0.4, "gamma": 0.2},
    "both": {"alpha": 0.4, "beta": 0.4, "gamma": 0.2},
}


def with_preset(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe that is a map still, with its preset's values for the keys that it does not give.

    What is no preset or no section is left as it is, for the recipe's own check to name.

    Raises:
        ValueError: `auto`, and the student is not pruned by the recipe.
    """
    name = data.get("preset")
    if not isinstance(name, str) or name not in get_args(PresetName):
        return dict(data)
    named = [cut for cut in _WEIGHTS if cut == name.removesuffix(_AGGRESSIVE)]
    cut = named[0] if named else _cut_of_section(data.get("student"), name)
    if cut is None:
        return dict(data)
    sections = preset_values(cut, is_aggressive=name.endswith(_AGGRESSIVE))
    given = {section: data.get(section, {}) for section in sections}
    filled = {section: {**sections[section], **own} for section, own in given.items() if isinstance(own, Mapping)}
    return {**data, **filled}


def preset_values(cut: Cut, *, is_aggressive: bool) -> dict[str, dict[str, float]]:
    """Return what a preset says, section by section."""
    return {
        "loss": {**_WEIGHTS[cut], "temperature": 3.0 if is_aggressive else 2.0},
        "train": {"learning_rate": 1e-5, "num_train_epochs": 5.0 if is_aggressive else 3.0},
    }


def cut_of(*, is_deep: bool, is_wide: bool) -> Cut:
    """Name what was cut, depth where nothing was: what changes a student least."""
    if is_wide:
        return "both" if is_deep else "width"
    return "depth"


def _cut_of_section(student: Any, name: str) -> Cut | None:
    """Read off a student section what it cuts; None where it says nothing that can be understood."""
    if not isinstance(student, Mapping):
        return None
    prune = student.get("prune")
    if isinstance(prune, Mapping):
        is_deep, is_wide = bool(prune.get("layers")), any(prune.get(width) for width in ("heads", "mlp", "hidden"))
        return cut_of(is_deep=is_deep, is_wide=is_wide) if is_deep or is_wide else None
    if student.get("path") or student.get("init"):
        kind = "path" if student.get("path") else "init"
        names = ", ".join(known + _AGGRESSIVE if name.endswith(_AGGRESSIVE) else known for known in get_args(Cut))
        raise ValueError(f"preset {name} goes by student.prune, but this student has {kind}: name one of {names}")
    return None
