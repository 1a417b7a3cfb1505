"""What this machine can do for a recipe: its devices, and whether its processor computes in half precision.

A recipe may be precomputed on one machine and trained on another. So what training lacks here is an error where it
begins, and a note before that.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import psutil
import torch
from transformers.utils import is_torch_bf16_gpu_available, is_torch_tf32_available

from coldstill.pipeline.models import load_config, resolve_dtype, resolve_folder
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.runtime.errors import RecipeError

# The instructions that compute in a dtype, of x86 and of ARM, as torch names them.
_INSTRUCTIONS = {
    "bfloat16": ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    "float16": ("avx512_fp16", "amx_fp16", "fp16_arith"),
}


def check_device(key: str, name: str, *, is_here: bool = True) -> None:
    """Refuse a device that torch does not know, or that this machine does not have.

    Args:
        key: The recipe's.
        name: The device's, or `auto`.
        is_here: Whether it is one of this machine; no machine is asked where it is not.

    Raises:
        RecipeError: It is none; says what there is.
    """
    if name == "auto":
        return
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RecipeError(f"{key} {name!r} is no device that torch knows; use auto, cpu or, for one, cuda:0") from None
    if is_here and (problem := _missing(device)):
        raise RecipeError(f"{key} is {name}, {problem}")


def _missing(device: torch.device) -> str | None:
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = 0 if here is None else torch.accelerator.device_count()
    if device.type == "cpu" or (here is not None and here.type == device.type and (device.index or 0) < count):
        return None
    has = "no accelerator" if here is None else f"{count} of type {here.type}, counted from 0"
    return f"but this machine has {has}; use auto or cpu"


def training_problem(recipe: Recipe) -> str | None:
    """Say what a recipe's training needs and this machine lacks; None where it lacks nothing."""
    train = recipe.train
    on_cpu = bool(train.get("use_cpu")) or not torch.accelerator.is_available()
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if on_cpu and (train.get("fp16") or (precision == "fp16" and not train.get("bf16"))):
        return (
            "train.fp16 needs an accelerator, and this machine trains on its CPU, which would compute in float32: set "
            "train.fp16=false"
        )
    if train.get("bf16") and not on_cpu and not is_torch_bf16_gpu_available():
        return "train.bf16 needs an accelerator with bfloat16, which this machine's is not: set train.bf16=false"
    if train.get("tf32") and not is_torch_tf32_available():
        return "train.tf32 needs an NVIDIA GPU of Ampere or later, and this machine has none: set train.tf32=false"
    return None


def machine_notes(recipe: Recipe, command: str) -> list[str]:
    """Say what a command will bear with on this machine: slow precision, and what later ones could not do here.

    Raises:
        ModelError: There is no such teacher.
        RecipeError: A device has a name that torch does not know.
    """
    notes: list[str] = []
    if command in ("prune", "precompute", "plan"):
        notes += _teacher_notes(recipe)
    if command in ("prune", "precompute"):
        notes += _later_notes(recipe)
    on_cpu = recipe.train.get("use_cpu") or not torch.accelerator.is_available()
    if command in ("train", "plan") and recipe.train.get("bf16") and on_cpu:
        notes += [f"train.bf16 {said}: set train.bf16=false" for said in _slowness("bfloat16")]
    if command == "train" and recipe.targets.is_live:
        notes += [
            "targets.source is live: the teacher stays in memory beside the student, and runs over every batch of "
            "every epoch and of every run; a store would run it once"
        ]
    return notes


def _teacher_notes(recipe: Recipe) -> Iterator[str]:
    section = recipe.teacher
    if section.device != "cpu" and not (section.device == "auto" and not torch.accelerator.is_available()):
        return
    folder = resolve_folder(section.path, revision=section.revision)
    dtype = resolve_dtype(load_config(folder, trust_remote_code=section.trust_remote_code), section.dtype)
    of_checkpoint = f" ({dtype}, the checkpoint's own)" if section.dtype == "auto" else ""
    for said in _slowness(dtype):
        yield (
            f"teacher.dtype {section.dtype}{of_checkpoint} {said}: set teacher.dtype=float32, which makes another store"
        )


def _later_notes(recipe: Recipe) -> Iterator[str]:
    """Say what later stages would be refused on this machine; they may run on another."""
    if problem := training_problem(recipe):
        yield f"{problem}, or train on another machine"
    device = recipe.evaluate.device
    check_device("evaluate.device", device, is_here=False)
    if device != "auto" and (problem := _missing(torch.device(device))):
        yield f"evaluate.device is {device}, {problem}, or evaluate on another machine"


def _slowness(dtype: str) -> Iterator[str]:
    """Say that the CPU is slow in a dtype; nothing where it is not, or torch does not know."""
    if is_slow_on_cpu(dtype):
        yield "is many times slower than float32 on this CPU, which has no instructions for it"


def is_slow_on_cpu(dtype: str) -> bool:
    """Whether this machine's CPU has no instructions for a dtype, by its name; no where torch does not know."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return dtype in _INSTRUCTIONS and bool(capabilities) and not any(map(capabilities.get, _INSTRUCTIONS[dtype]))


def free_bytes(device: torch.device) -> int:
    """Return how much memory of a device, or of the host, could be taken now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch holds and does not use is free too.
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return int(psutil.virtual_memory().available)
