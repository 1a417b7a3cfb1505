"""Students that learn through LoRA adapters: made, saved, restored and merged by PEFT, which is an extra."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from cache.errors import RecipeError

try:
    import peft
except ImportError:
    peft = None


def add_adapters(student: PreTrainedModel, lora: Mapping[str, Any], *, seed: int) -> PreTrainedModel:
    """Freeze a student and put LoRA adapters into it.

    Args:
        student: The student.
        lora: Arguments of `peft.LoraConfig`.
        seed: Of the adapters' first values.

    Raises:
        RecipeError: PEFT is not installed, or refuses an argument.
    """
    if peft is None:
        raise RecipeError("student.lora needs PEFT; run: pip install 'coldstill[lora]'")
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # PEFT asks for a property of models by a name that transformers calls deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            return peft.get_peft_model(student, peft.LoraConfig(task_type="CAUSAL_LM", **lora))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"student.lora: {' '.join(str(error).split())}") from None


def has_adapters(student: PreTrainedModel) -> bool:
    """Whether a student learns through adapters."""
    return peft is not None and isinstance(student, peft.PeftModel)


def load_adapters(student: PreTrainedModel, folder: Path) -> None:
    """Give the adapters the values that were saved in a folder."""
    peft.set_peft_model_state_dict(student, peft.load_peft_weights(str(folder), device="cpu"))


def merged(student: PreTrainedModel) -> PreTrainedModel:
    """Give the plain model that a student with adapters amounts to; they are used up by it."""
    return student.merge_and_unload()
