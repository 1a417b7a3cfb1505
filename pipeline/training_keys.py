"""Which keys of a recipe are arguments of transformers' Trainer or of PEFT's LoRA, and which of them the recipe owns.

Reads the names and types off `transformers.TrainingArguments` and `peft.LoraConfig` themselves, so that a recipe can
use whatever the installed release knows, and a misspelt key is caught before any work. Both are imported only when
there is a key to check.
"""

import dataclasses
import difflib
import math
from collections.abc import Collection, Mapping
from typing import Any

# What each key that the recipe or the stage decides is decided by.
OWNED_KEYS: Mapping[str, str] = {
    "output_dir": "the recipe's output",
    "remove_unused_columns": "the batches, which hold what the losses need",
    "label_names": "the batches, which hold what the losses need",
    "label_smoothing_factor": "the losses: the teacher's distribution is the soft target",
    "resume_from_checkpoint": "coldstill train, which continues what was interrupted",
    "enable_jit_checkpoint": "coldstill train, which saves a checkpoint when it is interrupted",
    "do_train": "the command",
    "do_eval": "the command",
    "do_predict": "the command",
    "use_liger_kernel": "the losses",
    "include_for_metrics": "the batches, which hold what the losses need",
    "train_sampling_strategy": "the batches: the order of rows is a function of seed and epoch",
}


_OWNED_LORA_KEYS: Mapping[str, str] = {
    "task_type": "the student: a causal language model",
    "peft_type": "student.lora",
    "inference_mode": "the command",
    "base_model_name_or_path": "the recipe's student",
}


def check_training_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Check names and plain types of `train` keys, and give the values back, whole numbers made floats where floats go.

    Raises:
        ValueError: A key is unknown or owned, or a value has another type than TrainingArguments declares.
    """
    if not values:
        return values
    from transformers import TrainingArguments

    declared = {field.name: field.type for field in dataclasses.fields(TrainingArguments) if field.init}
    checked = {}
    for key, value in values.items():
        if key in OWNED_KEYS:
            raise ValueError(f"train.{key} is decided by {OWNED_KEYS[key]}; remove it")
        _check_name(f"train.{key}", key, declared, "transformers' TrainingArguments")
        checked[key] = _checked_value(key, value, declared[key])
    _check_length(checked)
    return checked


def check_best_metric(values: Mapping[str, Any], terms: Collection[str]) -> None:
    """Check that the metric of the best checkpoint is one that evaluation gives: the loss, or a term of it.

    Raises:
        ValueError: It is none.
    """
    metric = values.get("metric_for_best_model")
    known = [f"eval_{name}" for name in ("loss", *terms)]
    if metric is not None and f"eval_{metric}" not in known and metric not in known:
        raise ValueError(
            f"train.metric_for_best_model is {metric!r}, which no evaluation gives; with this loss there are "
            f"{', '.join(known)}"
        )


def check_lora_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Check names of `student.lora` keys, where PEFT is at hand, and give the values back.

    Raises:
        ValueError: A key is unknown or owned.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        return values  # stage one does without; stage two says that it is missing
    declared = {field.name for field in dataclasses.fields(LoraConfig) if field.init}
    for key in values:
        if key in _OWNED_LORA_KEYS:
            raise ValueError(f"student.lora.{key} is decided by {_OWNED_LORA_KEYS[key]}; remove it")
        _check_name(f"student.lora.{key}", key, declared, "peft's LoraConfig")
    return values


def _check_length(values: Mapping[str, Any]) -> None:
    """Refuse a run of no steps, which the Trainer takes for one of a single step, or of all the epochs."""
    steps, epochs = values.get("max_steps", -1), values.get("num_train_epochs", 1.0)
    if steps == 0 or steps < -1:
        raise ValueError(
            f"train.max_steps must be above 0, got {steps}; leave it out, or give -1, to train for "
            "train.num_train_epochs"
        )
    if not 0 < epochs < math.inf:
        raise ValueError(
            f"train.num_train_epochs must be above 0 and finite, got {epochs:g}; or give the steps, train.max_steps"
        )


def _check_name(dotted: str, key: str, declared: Collection[str], where: str) -> None:
    if key not in declared:
        nearest = difflib.get_close_matches(key, declared, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"unknown key {dotted!r}: {where} has no such argument{hint}")


def _checked_value(key: str, value: Any, declared: Any) -> Any:
    """Check plain numbers, booleans and strings; leave unions and enumerations to TrainingArguments."""
    if key == "activation_checkpointing" and value not in (True, False, "selective"):
        raise ValueError(f"train.{key} must be true, false or selective, got {value!r}")
    if key == "gradient_checkpointing" and not isinstance(value, bool):
        raise ValueError(f"train.{key} must be of type bool, got {value!r}; see train.activation_checkpointing")
    if declared is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if declared in (bool, int, float, str) and type(value) is not declared:
        raise ValueError(f"train.{key} must be of type {declared.__name__}, got {value!r}")
    return value
