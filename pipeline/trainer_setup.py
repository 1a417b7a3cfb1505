"""From a recipe to the trainer of stage two: student, projectors, losses and rows, each checked against the others."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments
from transformers.integrations import is_tensorboard_available

from cache.errors import ModelError, RecipeError
from cache.manifest import Manifest
from cache.reader import require_complete
from pipeline.batches import BatchCollator, BatchColumns, StoredRows
from pipeline.config import Recipe
from pipeline.distiller import Distiller, Loss, LossWeights
from pipeline.loss_config import LossConfig
from pipeline.losses.divergences import Divergence
from pipeline.losses.schedules import Schedule
from pipeline.models import check_length, check_vocabularies, load_config, load_model, load_tokenizer, text_config
from pipeline.pairing import layer_map_of
from pipeline.projectors import create_projectors
from pipeline.run_index import RunRows
from pipeline.runs.folder import checkpoints_folder
from pipeline.selective_checkpointing import SELECTIVE
from pipeline.students.adapters import add_adapters
from pipeline.target_forms import column_axes, logits_columns, target_forms
from pipeline.targets.columns import columns_of
from pipeline.trainer import UniversalDistillationTrainer

_READERS = 2


def create_trainer(recipe: Recipe, run: RunRows, student_folder: Path) -> UniversalDistillationTrainer:
    """Make the trainer of a recipe, over the rows and the student that were found for it.

    Raises:
        StoreError: The store lacks a column that the recipe needs.
        RecipeError: The recipe does not fit the store or the student.
        ModelError: The student cannot be loaded, or has another vocabulary.
    """
    student = _load_student(recipe, run, student_folder)
    if recipe.student.lora is not None:
        student = add_adapters(student, recipe.student.lora, seed=recipe.seed)
    layer_map, collator = _plan(recipe, run, student.config)
    return _make_trainer(recipe, run, student, layer_map, collator, student_folder)


def _load_student(recipe: Recipe, run: RunRows, folder: Path) -> PreTrainedModel:
    """Load the student in float32: mixed precision is `train.bf16`, over float32 weights."""
    config = load_config(folder, trust_remote_code=recipe.student.trust_remote_code)
    check_vocabularies(run.store.teacher["vocab_size"], config)
    check_length(config, recipe.data.sequence_length, who="student")
    return load_model(folder, dtype="float32", trust_remote_code=recipe.student.trust_remote_code)


def _plan(recipe: Recipe, run: RunRows, student: PreTrainedConfig) -> tuple[dict[int, int], BatchCollator]:
    """Decide the layer map and the columns of a batch, and check that the store has them."""
    loss, logits = recipe.loss, recipe.targets.logits
    layer_map: dict[int, int] = {}
    if loss.needs_hidden:
        layer_map = layer_map_of(recipe.mapping, student, num_teacher_blocks=run.store.teacher["num_blocks"])
        _check_blocks(recipe, layer_map)
    if loss.ever("beta") and logits.kind != "final" and loss.temperature not in logits.temperatures:
        stored = ", ".join(f"{temperature:g}" for temperature in logits.temperatures)
        raise RecipeError(
            f"loss.temperature {loss.temperature:g} is not stored; targets.logits.temperatures has {stored}: "
            "use one of these, add it there and run: coldstill precompute, or store what gives every temperature: "
            "targets.logits.kind=final"
        )
    manifest = Manifest(run.store)
    blocks = list(layer_map.values())
    shards = run.selections["train"].shard_names
    wanted = columns_of(recipe.targets, blocks=blocks, split="train", manifest=manifest, shards=shards)
    of_logits = logits_columns(wanted, loss.temperature) if loss.ever("beta") else {}
    columns = BatchColumns(logits=of_logits, hidden=wanted.hidden)
    for selection in run.selections.values():
        require_complete(manifest, selection, columns.names(), store=run.store.path)
    return layer_map, BatchCollator(columns, column_axes(manifest, columns, shards[0]))


def _check_blocks(recipe: Recipe, layer_map: Mapping[int, int]) -> None:
    if recipe.loss.ever("delta") and len(layer_map) < 2:
        raise RecipeError(
            "loss.delta compares changes from one mapped block to the next, but the mapping has one pair: map more, or "
            "set loss.delta to 0"
        )
    stored = recipe.targets.hidden.blocks
    if isinstance(stored, list):
        lacking = sorted(set(layer_map.values()) - set(stored))
        if lacking:
            raise RecipeError(
                f"the mapping needs teacher block {lacking[0]}, but targets.hidden.blocks stores {stored}"
            )


def _make_trainer(
    recipe: Recipe,
    run: RunRows,
    student: PreTrainedModel,
    layer_map: dict[int, int],
    collator: BatchCollator,
    student_folder: Path,
) -> UniversalDistillationTrainer:
    projector = recipe.projector
    projectors = create_projectors(
        layer_map,
        student_width=int(text_config(student.config).hidden_size),
        teacher_width=run.store.teacher["hidden_size"],
        kind=projector.kind,
        learnable=projector.learnable,
        seed=recipe.seed,
    )
    datasets = {
        split: StoredRows(run.store.path, selection, collator.columns, local_copy=recipe.local_copy)
        for split, selection in run.selections.items()
    }
    tokenizer = None
    with contextlib.suppress(ModelError):
        tokenizer = load_tokenizer(student_folder, trust_remote_code=recipe.student.trust_remote_code)
    forms = target_forms(recipe, run.store, collator.columns)
    arguments = _training_arguments(recipe)
    if "tensorboard" in arguments.report_to and not is_tensorboard_available():
        raise RecipeError(
            "train.report_to names tensorboard, which is not installed; run: pip install 'coldstill[tensorboard]'"
        )
    distiller = Distiller(student, projectors, layer_map=layer_map, loss=_loss_of(recipe.loss), forms=forms)
    try:
        trainer = UniversalDistillationTrainer(
            distiller,
            arguments,
            data_collator=collator,
            train_dataset=datasets["train"],
            eval_dataset=datasets["eval"],
            processing_class=tokenizer,
            projector_learning_rate=projector.learning_rate,
        )
    except (ImportError, RuntimeError) as error:
        # What `report_to`, `deepspeed` and their like need and do not find.
        raise RecipeError(f"train: {' '.join(str(error).split())}") from None
    if trainer.is_fsdp_enabled and recipe.student.lora is not None:
        raise RecipeError("student.lora does not train under FSDP, whose shards cannot be merged: train without fsdp")
    return trainer


def _loss_of(section: LossConfig) -> Loss:
    given = {name: schedule for name, schedule in section.schedule if schedule is not None}
    schedules = {}
    for name, schedule in given.items():
        start = getattr(section, name)
        end = start if schedule.end is None else schedule.end
        schedules[name] = Schedule(schedule.shape, start, end, schedule.warmup)
    return Loss(
        weights=LossWeights(section.alpha, section.beta, section.gamma, section.temperature, section.delta),
        divergence=Divergence(
            section.divergence, section.divergence_weight, section.selective_k, section.selective_entropy
        ),
        hidden=section.hidden,
        dynamics=section.dynamics,
        schedules=schedules,
    )


def _training_arguments(recipe: Recipe) -> TrainingArguments:
    # Without an accelerator there is no memory to pin, and bf16 has to be asked of the CPU.
    has_accelerator = torch.accelerator.is_available()
    defaults = {
        "logging_steps": 10,
        "run_name": recipe.output,
        "dataloader_pin_memory": has_accelerator,
        "use_cpu": not has_accelerator,
        # A GPU computes while others read and decompress; without one, both want the same cores.
        "dataloader_num_workers": _READERS if has_accelerator else 0,
        # With the hidden term alone the student's output head gets no gradient, and DDP must be told to look.
        "ddp_find_unused_parameters": not (recipe.loss.ever("alpha") or recipe.loss.ever("beta")),
    }
    owned = {
        "output_dir": str(checkpoints_folder(recipe)),
        "remove_unused_columns": False,
        "label_names": ["labels"],
    }
    given = dict(recipe.train)
    if given.get("activation_checkpointing") == SELECTIVE:
        given |= {"activation_checkpointing": True, "activation_checkpointing_kwargs": {SELECTIVE: True}}
    try:
        return TrainingArguments(**{**defaults, **given, **owned})
    except (ValueError, TypeError) as error:
        raise RecipeError(f"train: {' '.join(str(error).split())}") from None
