"""The `train` section as transformers' TrainingArguments: built, and what its values name really looked up.

Stage one checks what holds on every machine, and sets up nothing for it; stage two builds the arguments for its own.
"""

import contextlib
import copy
import dataclasses
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations, is_azureml_available, is_deepspeed_available
from transformers.integrations.integration_utils import get_reporting_integration_callbacks, is_flytekit_available

from coldstill.pipeline.losses.objective import Objective
from coldstill.pipeline.models import compiled_blocks
from coldstill.pipeline.models.compiled_blocks import Compilation
from coldstill.pipeline.models.machine import training_problem
from coldstill.pipeline.models.selective_checkpointing import SELECTIVE, enable_of
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.recipe.training_keys import EARLIER_NAMES, OWN_KEYS
from coldstill.pipeline.runtime.errors import RecipeError
from coldstill.pipeline.runtime.out_of_memory import is_out_of_memory
from coldstill.pipeline.stage_two.run_folder import checkpoints_folder
from coldstill.pipeline.students.adapters import check_adapters

# Of processes, where they are asked for; of threads, where rows are fed to an accelerator.
_READERS = 2
_READER_THREADS = 4
# Where the best step is kept: the start is judged, then some ten times over the run; of what is saved, the best and the
# newest checkpoint stay.
_KEEPING = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 0.1, "save_total_limit": 2}
_OF_WORKERS = ("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context")
# What is set up for real where training begins, and only there.
_OF_THE_MACHINE = {
    "use_cpu": True,
    "tf32": None,
    "deepspeed": None,
    "ddp_backend": None,
    "dataloader_pin_memory": False,
}
_PACKAGE_OF_INTEGRATION = {
    "tensorboard": "'coldstill[tensorboard]'",
    "comet_ml": "comet-ml",
    "azure_ml": "azureml-sdk",
    "flyte": "flytekit",
}
# Which of them are installed, transformers lists; but never flyte, and azure_ml only where mlflow is not there.
_NOT_LISTED = {"azure_ml": is_azureml_available, "flyte": is_flytekit_available}
_A_FEW_STEPS = 100
# Of activation_checkpointing_kwargs, what is no keyword of torch's; only later transformers know the last two.
_CHECKPOINT_KEYS = {"preserve_rng_state", SELECTIVE}
_CHECKPOINT_KEYS |= {"every_n_layers", "offload"} & set(inspect.signature(enable_of(PreTrainedModel)).parameters)


class _Anywhere(TrainingArguments):
    """Arguments that set up no device and no process group."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


def arguments_here(recipe: Recipe) -> TrainingArguments:
    """Build the arguments with which this process trains.

    Raises:
        RecipeError: They are wrong, or this machine is.
    """
    if problem := training_problem(recipe):
        raise RecipeError(problem)
    check_launch(recipe)
    return _build(TrainingArguments, _values(recipe, torch.accelerator.is_available()))


def reader_threads(recipe: Recipe, device: torch.device) -> int:
    """Return how many threads read rows while a device trains: none for a CPU, where both want the same cores.

    None, too, where processes read.
    """
    given = recipe.train.get("dataloader_threads")
    if given is not None:
        return int(given)
    if device.type == "cpu" or any(map(recipe.train.get, ("dataloader_num_workers", *_OF_WORKERS))):
        return 0
    of_process = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_READER_THREADS, of_process))


def check_launch(recipe: Recipe) -> None:
    """Refuse training in one process that asks for several.

    Raises:
        RecipeError: It does.
    """
    if recipe.train.get("fsdp") and _num_processes() == 1:
        raise RecipeError(
            "train.fsdp shards the student over several processes, but this is one: start training with accelerate "
            "launch -m coldstill train, or remove it"
        )


def check_train_section(
    recipe: Recipe, outline: Callable[[], PreTrainedModel], *, arguments: TrainingArguments | None = None
) -> None:
    """Refuse a `train` section, or adapters, that no training could begin with.

    Args:
        recipe: The recipe.
        outline: Gives the student's modules without weights; called where names are to be found among them.
        arguments: With which this process trains; None where it does not.

    Raises:
        RecipeError: A value is wrong, or names what is unknown or not installed.
    """
    if arguments is None:
        # As on a machine with an accelerator, which has defaults of its own.
        arguments = _build(_Anywhere, _values(recipe, has_accelerator=True) | _OF_THE_MACHINE)
    _check_integrations(arguments)
    # By the earlier name, which the later one is mirrored in.
    unknown = set(arguments.gradient_checkpointing_kwargs or {}) - _CHECKPOINT_KEYS - _keywords(checkpoint)
    if unknown:
        raise RecipeError(f"train.activation_checkpointing_kwargs has no {', '.join(sorted(unknown))}")
    Compilation.of(recipe.train)
    with _one_line():
        _check_optimizer(arguments, outline)
    if recipe.student.lora is not None:
        if arguments.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
            raise RecipeError(
                "student.lora does not train under FSDP, whose shards cannot be merged: train without fsdp"
            )
        check_adapters(outline, recipe.student.lora)


def check_row_count(recipe: Recipe, num_rows: int, *, num_processes: int = 1) -> None:
    """Refuse train rows of which dropping the last batch would leave none.

    Raises:
        RecipeError: They do not fill one batch.
    """
    batch_size = recipe.training["per_device_train_batch_size"]
    if recipe.train.get("dataloader_drop_last") and num_rows < batch_size * num_processes:
        raise RecipeError(
            f"train.dataloader_drop_last drops the only batch: there are {num_rows} train rows, and "
            f"train.per_device_train_batch_size is {batch_size}"
            + (f" on each of {num_processes} processes" if num_processes > 1 else "")
        )


def _values(recipe: Recipe, has_accelerator: bool) -> dict[str, Any]:
    # Without an accelerator there is no memory to pin, and bf16 has to be asked of the CPU.
    defaults = {
        "logging_steps": 10,
        "run_name": recipe.output,
        "dataloader_pin_memory": has_accelerator,
        "use_cpu": not has_accelerator,
        # Threads read for an accelerator, unless the recipe speaks of processes.
        "dataloader_num_workers": _READERS if has_accelerator and any(map(recipe.train.get, _OF_WORKERS)) else 0,
        # With terms over block outputs alone the student's output head gets no gradient, and DDP must be told to look.
        "ddp_find_unused_parameters": not Objective.of(recipe.loss).over_vocabulary,
        # Of the exported student: training asks for no cache in each call.
        "use_cache": True,
        # Whatever evaluation gives is a loss; the Trainer would take `eval_loss_logits` for a score.
        "greater_is_better": False,
    }
    owned = {
        "output_dir": str(checkpoints_folder(recipe)),
        "remove_unused_columns": False,
        "label_names": ["labels"],
    }
    # A copy: TrainingArguments changes the maps that it is given.
    not_its_own = {*compiled_blocks.KEYS, *OWN_KEYS}
    given = {key: value for key, value in copy.deepcopy(recipe.training).items() if key not in not_its_own}
    if recipe.kept_by is not None:
        defaults |= _KEEPING
        # How the best is kept is the trainer's own: `ResumableTrainer.keep_best`.
        given |= {"metric_for_best_model": recipe.kept_by, "load_best_model_at_end": False}
        if "eval_strategy" in given:
            del defaults["eval_steps"]
    if given.get("activation_checkpointing") == SELECTIVE:
        given |= {"activation_checkpointing": True, "activation_checkpointing_kwargs": {SELECTIVE: True}}
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    given = {key if key in known else EARLIER_NAMES[key]: value for key, value in given.items()}
    if given.get("deepspeed") is not None:
        _check_deepspeed(given["deepspeed"])
    if _num_processes() == 1:
        given.pop("ddp_backend", None)  # by which one process talks to nobody, and accelerate stumbles over it
    values = {**defaults, **given, **owned}
    for key in _OF_WORKERS:
        if values.get(key) and values["dataloader_num_workers"] == 0:
            raise RecipeError(
                f"train.{key} needs train.dataloader_num_workers above 0, which is 0 by default without an accelerator"
            )
    return values


def _num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _build(kind: type[TrainingArguments], values: dict[str, Any]) -> TrainingArguments:
    with _one_line():
        return kind(**values)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Turn what libraries say of a user's values, by whatever exception, into an error of the recipe."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        raise RecipeError(f"train: {re.sub(r'--(?=[a-z])', 'train.', text)}") from None


def _check_deepspeed(value: Any) -> None:
    # Asked before TrainingArguments are built: they leave a half-made config behind where it is missing.
    if not is_deepspeed_available():
        raise RecipeError("train.deepspeed needs DeepSpeed, which is not installed; run: pip install deepspeed")
    if isinstance(value, str) and not value.startswith("{"):
        try:
            json.loads(Path(value).read_text())
        except (OSError, ValueError) as error:
            raise RecipeError(f"train.deepspeed {value} cannot be read as JSON: {error}") from None


def _check_integrations(arguments: TrainingArguments) -> None:
    with _one_line():
        get_reporting_integration_callbacks(arguments.report_to)
    # Asked, and not tried: one that is missing may write to the screen when it is thrown away.
    installed = {name for name, is_there in _NOT_LISTED.items() if is_there()}
    missing = set(arguments.report_to) - set(get_available_reporting_integrations()) - installed
    for name in sorted(missing):
        package = _PACKAGE_OF_INTEGRATION.get(name, name)
        raise RecipeError(f"train.report_to names {name}, which is not installed; run: pip install {package}")


def _check_optimizer(arguments: TrainingArguments, outline: Callable[[], PreTrainedModel]) -> None:
    """Make the optimizer and the scheduler of a parameter that nobody trains."""
    asks_for_names = arguments.optim_target_modules is not None or "lomo" in arguments.optim
    # By the names that the Trainer sees, which are a distiller's.
    model = nn.ModuleDict({"student": outline()}) if asks_for_names else None
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    parameters = [nn.Parameter(torch.zeros(2, 2))]
    optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=arguments.learning_rate)
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and not asks_for_names:
        optimizer = kind(parameters, **options)
    num_steps = arguments.max_steps if arguments.max_steps > 0 else _A_FEW_STEPS
    get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=arguments.get_warmup_steps(num_steps),
        num_training_steps=num_steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )


def _keywords(function: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
