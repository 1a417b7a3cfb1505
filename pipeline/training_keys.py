"""Which keys of a recipe's `train` section are arguments of transformers' Trainer, and which the recipe owns.

Reads the names and types off `transformers.TrainingArguments` itself, so that a recipe can use whatever the installed
release knows, and a misspelt key is caught before any work. Transformers is imported only when there is a key to check.
"""

import difflib
from collections.abc import Mapping
from typing import Any

# What each key that the recipe or the stage decides is decided by.
OWNED_KEYS: Mapping[str, str] = {
    "output_dir": "the recipe's output",
    "remove_unused_columns": "the batches, which hold what the losses need",
    "label_names": "the batches, which hold what the losses need",
    "label_smoothing_factor": "the losses: the teacher's distribution is the soft target",
    "resume_from_checkpoint": "coldstill train, which continues what was interrupted",
    "do_train": "the command",
    "do_eval": "the command",
    "do_predict": "the command",
    "use_liger_kernel": "the losses",
    "include_for_metrics": "the batches, which hold what the losses need",
    "train_sampling_strategy": "the batches: the order of rows is a function of seed and epoch",
}


def check_training_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Check names and plain types of `train` keys, and give the values back, whole numbers made floats where floats go.

    Raises:
        ValueError: A key is unknown or owned, or a value has another type than TrainingArguments declares.
    """
    if not values:
        return values
    import dataclasses

    from transformers import TrainingArguments

    declared = {field.name: field.type for field in dataclasses.fields(TrainingArguments) if field.init}
    checked = {}
    for key, value in values.items():
        if key in OWNED_KEYS:
            raise ValueError(f"train.{key} is decided by {OWNED_KEYS[key]}; remove it")
        if key not in declared:
            nearest = difflib.get_close_matches(key, declared, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"unknown key 'train.{key}': transformers' TrainingArguments has no such argument{hint}")
        checked[key] = _checked_value(key, value, declared[key])
    return checked


def _checked_value(key: str, value: Any, declared: Any) -> Any:
    """Check plain numbers, booleans and strings; leave unions and enumerations to TrainingArguments."""
    if declared is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if declared in (bool, int, float, str) and type(value) is not declared:
        raise ValueError(f"train.{key} must be of type {declared.__name__}, got {value!r}")
    return value
