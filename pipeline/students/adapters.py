"""Students that learn through LoRA adapters: made, saved, restored and merged by PEFT, which is an extra."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from coldstill.pipeline.runtime.errors import ModelError, RecipeError

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
    _require_peft()
    with _one_line(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _adapted(student, lora)


def check_adapters(outline: Callable[[], PreTrainedModel], lora: Mapping[str, Any]) -> None:
    """Refuse adapters that a student could not be given, by its modules alone.

    Args:
        outline: Gives the student's modules without weights, new ones in each call.
        lora: Arguments of `peft.LoraConfig`.

    Raises:
        RecipeError: PEFT is not installed, refuses an argument, or finds no module to adapt.
    """
    _require_peft()
    with _one_line():
        try:
            _adapted(outline(), lora)
        except RuntimeError:
            # Some first values are drawn from the weights, which are not there.
            _adapted(outline(), {**lora, "init_lora_weights": True})


def _require_peft() -> None:
    if peft is None:
        raise RecipeError("student.lora needs PEFT; run: pip install 'coldstill[lora]'")


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, NotImplementedError) as error:
        raise RecipeError(f"student.lora: {' '.join(str(error).split())}") from None


def _adapted(student: PreTrainedModel, lora: Mapping[str, Any]) -> PreTrainedModel:
    with warnings.catch_warnings():
        # PEFT asks for a property of models by a name that transformers calls deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(student, peft.LoraConfig(task_type="CAUSAL_LM", **lora))


def has_adapters(student: PreTrainedModel) -> bool:
    """Whether a student learns through adapters."""
    return peft is not None and isinstance(student, peft.PeftModel)


def load_adapters(student: PreTrainedModel, folder: Path) -> None:
    """Return the adapters the values that were saved in a folder.

    Raises:
        ModelError: One is missing, which PEFT would leave as it is.
    """
    saved = peft.load_peft_weights(str(folder), device="cpu")
    missing = sorted(peft.get_peft_model_state_dict(student).keys() - saved.keys())
    if missing:
        raise ModelError(f"{folder} lacks {len(missing)} weights of its adapters, {missing[0]} among them")
    peft.set_peft_model_state_dict(student, saved)


def merged(student: PreTrainedModel) -> PreTrainedModel:
    """Return the plain model that a student with adapters amounts to; they are used up by it."""
    return student.merge_and_unload()
