"""Presets: the loss and the training that fit what was cut, as defaults behind what a recipe says itself.

Knows plain maps only: a preset is written into a recipe before the recipe is checked, so that the resolved recipe says
every value and needs no preset to mean the same.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

Cut = Literal["depth", "width", "both"]
PresetName = Literal[
    "auto",
    "depth",
    "width",
    "both",
    "book",
    "book_depth",
    "book_width",
    "book_both",
    "book_aggressive",
    "book_depth_aggressive",
    "book_width_aggressive",
    "book_both_aggressive",
]
Sections = dict[str, dict[str, Any]]

# By measured recovery: docs/results.md.
_LOSS = {"alpha": 0.0, "beta": 1.0, "gamma": 0.0, "temperature": 1.0}
_LEARNING_RATE = 2e-4
_LEARNING_RATE_OF_NARROW_STREAMS = 5e-4  # they lose most
_LEARNING_RATE_OF_ADAPTERS = 1e-3  # of LoRA, whatever was cut
# Martra, Rearchitecting LLMs: for whoever wants to follow it.
_BOOK = "book"
_AGGRESSIVE = "_aggressive"
_BOOK_WEIGHTS: Mapping[Cut, Mapping[str, float]] = {
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
    cut = _cut_of_name(name) or _cut_of_section(data.get("student"), name)
    if cut is None:
        return dict(data)
    student = data.get("student")
    said = student if isinstance(student, Mapping) else {}
    sections = preset_values(
        name, cut, has_adapters=bool(said.get("lora")), narrows_stream=_narrows_stream(cut, said.get("prune"))
    )
    given = {section: data.get(section, {}) for section in sections}
    filled = {section: {**sections[section], **own} for section, own in given.items() if isinstance(own, Mapping)}
    return {**data, **filled}


def preset_values(name: PresetName | str, cut: Cut, *, has_adapters: bool, narrows_stream: bool) -> Sections:
    """Return what a preset says of a student that was cut so, section by section."""
    if not name.startswith(_BOOK):
        rate = learning_rate_of(has_adapters=has_adapters, narrows_stream=narrows_stream)
        return {"loss": dict(_LOSS), "train": {"learning_rate": rate}}
    is_aggressive = name.endswith(_AGGRESSIVE)
    return {
        "loss": {**_BOOK_WEIGHTS[cut], "hidden": "mse", "temperature": 3.0 if is_aggressive else 2.0},
        "train": {"learning_rate": 1e-5, "num_train_epochs": 5.0 if is_aggressive else 3.0},
    }


def learning_rate_of(*, has_adapters: bool, narrows_stream: bool) -> float:
    """Return the learning rate, at its highest.

    Args:
        has_adapters: Whether the student learns by adapters alone.
        narrows_stream: Whether its residual stream has fewer channels than the teacher's.
    """
    if has_adapters:
        return _LEARNING_RATE_OF_ADAPTERS
    return _LEARNING_RATE_OF_NARROW_STREAMS if narrows_stream else _LEARNING_RATE


def cut_of(*, is_deep: bool, is_wide: bool) -> Cut:
    """Name what was cut, depth where nothing was: what changes a student least."""
    if is_wide:
        return "both" if is_deep else "width"
    return "depth"


def _cut_of_name(name: str) -> Cut | None:
    """Return the cut that a preset names; None where it goes by the student."""
    named = [cut for cut in _BOOK_WEIGHTS if cut == name.removeprefix(f"{_BOOK}_").removesuffix(_AGGRESSIVE)]
    return named[0] if named else None


def _narrows_stream(cut: Cut, prune: Any) -> bool:
    """Whether the stream is narrower: as `student.prune` says, else as the name of a cut lets one think."""
    return cut != "depth" and (not isinstance(prune, Mapping) or bool(prune.get("hidden")))


def _cut_of_section(student: Any, name: str) -> Cut | None:
    """Read off a student section what it cuts; None where it says nothing that can be understood."""
    if not isinstance(student, Mapping):
        return None
    prune = student.get("prune")
    if isinstance(prune, Mapping):
        is_deep = bool(prune.get("layers"))
        is_wide = bool(prune.get("heads") or prune.get("mlp") or prune.get("hidden"))
        return cut_of(is_deep=is_deep, is_wide=is_wide) if is_deep or is_wide else None
    if student.get("path") or student.get("init"):
        kind = "path" if student.get("path") else "init"
        others = [
            other
            for other in get_args(PresetName)
            if _cut_of_name(other) is not None
            and other.startswith(_BOOK) == name.startswith(_BOOK)
            and other.endswith(_AGGRESSIVE) == name.endswith(_AGGRESSIVE)
        ]
        raise ValueError(
            f"preset {name} goes by student.prune, but this student has {kind}: name one of {', '.join(others)}"
        )
    return None
