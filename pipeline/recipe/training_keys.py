"""Which keys of a recipe are arguments of transformers' Trainer or of PEFT's LoRA, and which of them the recipe owns.

Reads the names and types off `transformers.TrainingArguments` and `peft.LoraConfig` themselves, so that a recipe can
use whatever the installed release knows, and a misspelt key is caught before any work. Both are imported only when
there is a key to check. What the values name (optimizers, integrations, files) is looked up by
`coldstill.pipeline.stage_two.arguments`.
"""

import dataclasses
import difflib
import math
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

_BATCHES = "the batches, which hold what the losses need"
_ORDER = "the batches: the order of rows is a function of seed and epoch"
_EVALUATION = "the losses: evaluation during training runs as training does, and gives losses alone"
_HUB = "coldstill report --push, which sends the student with its card"

# What each key that the recipe or the stage decides is decided by.
OWNED_KEYS: Mapping[str, str] = {
    "output_dir": "the recipe's output",
    "remove_unused_columns": _BATCHES,
    "label_names": _BATCHES,
    "label_smoothing_factor": "the losses: the teacher's distribution is the soft target",
    "resume_from_checkpoint": "coldstill train, which continues what was interrupted",
    "greater_is_better": "the losses, all of which are better where they are lower",
    "enable_jit_checkpoint": "coldstill train, which saves a checkpoint when it is interrupted",
    "do_train": "the command",
    "do_eval": "the command",
    "do_predict": "the command",
    "local_rank": "torchrun or accelerate launch",
    "parallelism_config": "accelerate launch",
    "use_liger_kernel": "the losses",
    "liger_kernel_config": "the losses",
    "include_for_metrics": _BATCHES,
    "train_sampling_strategy": _ORDER,
    "length_column_name": _ORDER,
    "dataloader_in_order": _ORDER,
    "bf16_full_eval": _EVALUATION,
    "fp16_full_eval": _EVALUATION,
    "prediction_loss_only": _EVALUATION,
    "batch_eval_metrics": _EVALUATION,
    "eval_accumulation_steps": _EVALUATION,
    "eval_do_concat_batches": _EVALUATION,
    "eval_use_gather_object": _EVALUATION,
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
}

_LEAST: Mapping[str, float] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("torch_empty_cache_steps", "save_total_limit", "dataloader_prefetch_factor"), 1),
    **dict.fromkeys(("ddp_bucket_cap_mb", "ddp_timeout"), 1),
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"), 0),
    **dict.fromkeys(("seed", "data_seed", "eval_delay", "warmup_steps"), 0),
    **dict.fromkeys(("dataloader_num_workers", "dataloader_threads"), 0),
    "neftune_noise_alpha": 0,
}
_ABOVE_ZERO = ("logging_steps", "eval_steps", "save_steps")
_BELOW: Mapping[str, float] = {"adam_beta1": 1, "adam_beta2": 1, "seed": 2**32, "data_seed": 2**32}
_CHOICES: Mapping[str, Collection[Any]] = {
    "activation_checkpointing": (True, False, "selective"),
    "include_num_input_tokens_seen": (True, False, "all", "non_padding", "no"),
}
# Keys of the section that are no arguments of transformers', with what they may be; a whole number where none is named.
OWN_KEYS: Mapping[str, Collection[str]] = {"keep": ("best", "last"), "dataloader_threads": ()}
# What `keep: best` goes by: the divergence on eval rows; where these are of several sources, its mean over those that
# are not of train's own data set.
OWN_METRIC, OTHERS_METRIC = "eval_loss_logits", "eval_loss_logits_of_others"
# `no` without quotes is false in YAML.
_STRATEGIES = ("eval_strategy", "save_strategy", "logging_strategy")

# What transformers called them before 5.23; until its version 6, both names are known.
EARLIER_NAMES: Mapping[str, str] = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}

# Where transformers' own recovers less, by measurement: docs/results.md. The learning rate goes by the student:
# `coldstill.pipeline.recipe.presets.learning_rate_of`.
TRAINING_DEFAULTS: Mapping[str, Any] = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # below 1 it is a share of the steps
    "per_device_train_batch_size": 4,
}

_OWNED_LORA_KEYS: Mapping[str, str] = {
    "task_type": "the student: a causal language model",
    "peft_type": "student.lora",
    "inference_mode": "the command",
    "base_model_name_or_path": "the recipe's student",
}


def check_training_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Check names, types and ranges of `train` keys, and return the values back as TrainingArguments takes them.

    Raises:
        ValueError: A key is unknown or owned, or a value is of another type than TrainingArguments declares, or out of
            its range, or does not go with another.
    """
    if not values:
        return values
    from transformers import TrainingArguments

    declared = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
    for name, earlier in EARLIER_NAMES.items():
        declared.setdefault(name, declared[earlier])
    checked = {}
    for key, value in values.items():
        if key in OWNED_KEYS:
            raise ValueError(f"train.{key} is decided by {OWNED_KEYS[key]}; remove it")
        if key in OWN_KEYS:
            _check_choice(key, value, OWN_KEYS[key])
            checked[key] = value if OWN_KEYS[key] else _checked_value(key, value, int)
            _check_range(key, checked[key])
            continue
        _check_name(f"train.{key}", key, [*declared, *OWN_KEYS], "transformers' TrainingArguments")
        _check_choice(key, value, _CHOICES.get(key) or declared[key].metadata.get("choices"))
        checked[key] = _checked_value(key, value, declared[key].type)
        _check_range(key, checked[key])
    _check_length(checked)
    _check_together(checked)
    return checked


def check_keep(values: Mapping[str, Any], terms: Collection[str], *, temperature_moves: bool) -> None:
    """Check that what `keep` says goes with the rest of the section, and with the loss.

    Raises:
        ValueError: It does not.
    """
    keep = values.get("keep")
    if keep == "last" and values.get("load_best_model_at_end"):
        raise ValueError("train.keep is last, but train.load_best_model_at_end is true: remove one of them")
    if keep != "best":
        return
    for key, why in (("save_strategy", "saves none of what could be kept"), ("eval_strategy", "judges nothing")):
        if values.get(key) == "no":
            raise ValueError(
                f"train.keep is best, but train.{key} no {why}: remove train.{key}, or set train.keep: last"
            )
    if values.get("metric_for_best_model") is not None:
        raise ValueError(
            "train.keep best goes by the divergence from the teacher on the eval rows: remove "
            "train.metric_for_best_model, or train.keep for train.load_best_model_at_end: true"
        )
    if "loss_logits" not in terms:
        raise ValueError(
            "train.keep best goes by the divergence from the teacher on the eval rows, but loss.beta is 0: set it "
            "above 0, or train.keep: last"
        )
    if temperature_moves:
        raise ValueError(
            "train.keep best compares the divergence of different steps, but loss.schedule.temperature makes it "
            "another one at each: use a constant temperature, or train.keep: last"
        )


def check_best_metric(values: Mapping[str, Any], terms: Collection[str], labels: Collection[str] = ()) -> None:
    """Check that the metric of the best checkpoint is one that evaluation gives: the loss, or a term of it.

    Args:
        values: The section.
        terms: What the log calls the terms.
        labels: What the sources of eval rows are called, where these are a list.

    Raises:
        ValueError: It is none.
    """
    metric = values.get("metric_for_best_model")
    known = [f"eval_{of}{name}" for of in ("", *(f"{label}_" for label in labels)) for name in ("loss", *terms)]
    if metric is not None and f"eval_{metric}" not in known and metric not in known:
        raise ValueError(
            f"train.metric_for_best_model is {metric!r}, which no evaluation gives; with this loss there are "
            f"{', '.join(known)}"
        )


def check_lora_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Check names of `student.lora` keys, where PEFT is at hand, and return the values back.

    Raises:
        ValueError: A key is unknown or owned.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        return values  # before a teacher or a student runs, it is said that PEFT is missing
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
    if epochs <= 0:
        raise ValueError(f"train.num_train_epochs must be above 0, got {epochs:g}; or give the steps, train.max_steps")


def _check_name(dotted: str, key: str, declared: Collection[str], where: str) -> None:
    if key not in declared:
        nearest = difflib.get_close_matches(key, declared, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"unknown key {dotted!r}: {where} has no such argument{hint}")


def _check_choice(key: str, value: Any, choices: Collection[Any] | None) -> None:
    if choices and value is not None and value not in tuple(choices):
        *names, last = [str(choice).lower() for choice in choices]
        raise ValueError(f"train.{key} must be {', '.join(names)} or {last}, got {value!r}")


def _checked_value(key: str, value: Any, declared: Any) -> Any:
    """Check the type of a value; enumerations are text here, and their names are left to TrainingArguments."""
    if key in _CHOICES:
        return value
    if key in _STRATEGIES and value is False:
        return "no"
    if key == "gradient_checkpointing" and not isinstance(value, bool | None):
        raise ValueError(f"train.{key} must be of type bool, got {value!r}; see train.activation_checkpointing")
    if key == "optim_args" and value is not None and any(part.count("=") != 1 for part in str(value).split(",")):
        raise ValueError(f"train.{key} must be pairs such as momentum=0.9,nesterov=true, got {value!r}")
    if key.endswith("_kwargs") and not isinstance(value, dict | None):
        raise ValueError(f"train.{key} must be a map, got {value!r}")
    if declared is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if key == "fsdp" and isinstance(value, bool):  # which its documentation asks for, and its type does not know
        return value
    try:
        TypeAdapter(declared, config=ConfigDict(strict=True, arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError:
        name = declared.__name__ if isinstance(declared, type) else str(declared)
        raise ValueError(f"train.{key} must be of type {name}, got {value!r}") from None
    return value


def _check_range(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not math.isfinite(value):
        raise ValueError(f"train.{key} must be a finite number, got {value!r}")
    if key in _LEAST and value < _LEAST[key]:
        raise ValueError(f"train.{key} must be at least {_LEAST[key]}, got {value!r}")
    if key in _BELOW and value >= _BELOW[key]:
        raise ValueError(f"train.{key} must be below {_BELOW[key]}, got {value!r}")
    if key in _ABOVE_ZERO and value <= 0:
        strategy = f"{key.partition('_')[0]}_strategy"
        raise ValueError(f"train.{key} must be above 0, got {value!r}; for none set train.{strategy}: 'no'")


def _check_together(values: Mapping[str, Any]) -> None:
    """Refuse what each key may be, but not both of them."""
    if values.get("fp16") and values.get("bf16"):
        raise ValueError("train.fp16 and train.bf16 are both true: set one of them to false")
    if values.get("fp16") and values.get("use_cpu"):
        raise ValueError("train.fp16 needs an accelerator, but train.use_cpu is true: set one of them to false")
    if values.get("dataloader_threads") and values.get("dataloader_num_workers"):
        raise ValueError(
            "train.dataloader_threads reads rows by threads and train.dataloader_num_workers by processes: remove one "
            "of them"
        )
    evaluates = values.get("eval_strategy", "no") != "no"
    if values.get("keep") == "best":
        return  # which judges, and by what
    if values.get("save_strategy") == "best" and not (evaluates and values.get("metric_for_best_model")):
        raise ValueError(
            "train.save_strategy best needs train.eval_strategy, epoch or steps, and train.metric_for_best_model, such "
            "as eval_loss"
        )
