"""Stage two: train the student and its projectors from the store. Neither teacher nor its files are needed."""

import contextlib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from cache.errors import IdentityError, ModelError, RecipeError
from cache.manifest import Manifest
from cache.reader import require_complete
from pipeline.batches import BatchCollator, BatchColumns, StoredRows
from pipeline.config import Recipe
from pipeline.distiller import Distiller, LossWeights
from pipeline.divergences import Divergence
from pipeline.model_card import model_card
from pipeline.models import (
    check_vocabularies,
    identify,
    load_config,
    load_model,
    load_tokenizer,
    resolve_dtype,
    resolve_folder,
    text_config,
)
from pipeline.pairing import layer_map_of
from pipeline.peak_memory import peak_memory_bytes
from pipeline.projectors import create_projectors
from pipeline.run_folder import (
    check_claim,
    checkpoints_folder,
    claim,
    export_student,
    finished_summary,
    last_checkpoint,
    remove_run,
    run_key,
    sweep_checkpoints,
    write_metrics,
)
from pipeline.run_index import RunRows, find_run_rows, trained_student
from pipeline.student_folders import find_student
from pipeline.target_forms import column_axes, logits_columns, target_forms
from pipeline.targets import columns_of
from pipeline.trainer import UniversalDistillationTrainer


@dataclass(frozen=True)
class TrainSummary:
    """What a run of stage two did.

    Attributes:
        student: The exported student's folder.
        num_steps: Optimizer steps of the whole run.
        trained_steps: Of these, the ones taken now; 0 where the run was complete.
        losses: The last logged loss and its terms.
        tokens_per_s: Over the steps taken now.
        seconds: Time of these steps.
        peak_memory_bytes: The most that the process held, on its accelerator where it has one.
    """

    student: str
    num_steps: int
    trained_steps: int
    losses: dict[str, float]
    tokens_per_s: float
    seconds: float
    peak_memory_bytes: int


def train(recipe: Recipe, *, restart: bool = False) -> TrainSummary:
    """Train the recipe's student, from the last complete checkpoint where there is one, and export it.

    Args:
        recipe: The recipe.
        restart: Begin anew, and remove what an earlier run of this output left.

    Raises:
        StoreError: The store lacks what the recipe needs, or belongs to another teacher.
        RecipeError: The recipe does not fit the store or the student, or the output holds another run.
    """
    run = find_run_rows(recipe)
    _check_teacher(recipe, run)
    student_folder = find_student(recipe)
    key = run_key(recipe, run)
    if restart:
        remove_run(recipe)
    check_claim(recipe, key)
    finished = finished_summary(recipe)
    if finished is not None:
        return TrainSummary(**{**finished, "trained_steps": 0})
    student = _load_student(recipe, run, student_folder)
    layer_map, collator = _plan(recipe, run, student.config)
    trainer = _make_trainer(recipe, run, student, layer_map, collator, student_folder)
    if trainer.is_world_process_zero():
        claim(recipe, key)
        sweep_checkpoints(recipe)
    started = time.monotonic()
    first_step, checkpoint = last_checkpoint(recipe)
    trainer.train(resume_from_checkpoint=checkpoint)
    return _finish(recipe, run, trainer, key, first_step=first_step, seconds=time.monotonic() - started)


def _check_teacher(recipe: Recipe, run: RunRows) -> None:
    """Where the teacher's files are at hand, hold them against the store; that they are gone is no fault."""
    try:
        folder = resolve_folder(recipe.teacher.path, revision=recipe.teacher.revision, local_only=True)
        config = load_config(folder, trust_remote_code=recipe.teacher.trust_remote_code)
        identity = identify(folder, config, dtype=resolve_dtype(config, recipe.teacher.dtype))
    except ModelError:
        return
    for field, stored in run.store.teacher["identity"].items():
        if identity[field] != stored:
            raise IdentityError(
                f"store {run.store.path} was made with another teacher than {recipe.teacher.path}: {field} "
                f"{stored[:12]} there, {identity[field][:12]} now; run: coldstill precompute"
            )


def _load_student(recipe: Recipe, run: RunRows, folder: Path) -> PreTrainedModel:
    """Load the student in float32: mixed precision is `train.bf16`, over float32 weights."""
    config = load_config(folder, trust_remote_code=recipe.student.trust_remote_code)
    check_vocabularies(run.store.teacher["vocab_size"], config)
    return load_model(folder, dtype="float32", trust_remote_code=recipe.student.trust_remote_code)


def _plan(recipe: Recipe, run: RunRows, student: PreTrainedConfig) -> tuple[dict[int, int], BatchCollator]:
    """Decide the layer map and the columns of a batch, and check that the store has them."""
    loss, logits = recipe.loss, recipe.targets.logits
    layer_map: dict[int, int] = {}
    if loss.gamma:
        layer_map = layer_map_of(recipe.mapping, student, num_teacher_blocks=run.store.teacher["num_blocks"])
        _check_blocks(recipe, layer_map)
    if loss.beta and logits.kind != "final" and loss.temperature not in logits.temperatures:
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
    columns = BatchColumns(logits=logits_columns(wanted, loss.temperature) if loss.beta else {}, hidden=wanted.hidden)
    for selection in run.selections.values():
        require_complete(manifest, selection, columns.names(), store=run.store.path)
    return layer_map, BatchCollator(columns, column_axes(manifest, columns, shards[0]))


def _check_blocks(recipe: Recipe, layer_map: Mapping[int, int]) -> None:
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
    loss, projector = recipe.loss, recipe.projector
    projectors = create_projectors(
        layer_map,
        student_width=int(text_config(student.config).hidden_size),
        teacher_width=run.store.teacher["hidden_size"],
        kind=projector.kind,
        learnable=projector.learnable,
        seed=recipe.seed,
    )
    weights = LossWeights(
        alpha=loss.alpha,
        beta=loss.beta,
        gamma=loss.gamma,
        temperature=loss.temperature,
        divergence=Divergence(loss.divergence, loss.divergence_weight, loss.selective_k, loss.selective_entropy),
        hidden=loss.hidden,
    )
    datasets = {
        split: StoredRows(run.store.path, selection, collator.columns, local_copy=recipe.local_copy)
        for split, selection in run.selections.items()
    }
    tokenizer = None
    with contextlib.suppress(ModelError):
        tokenizer = load_tokenizer(student_folder, trust_remote_code=recipe.student.trust_remote_code)
    forms = target_forms(recipe, run.store, collator.columns)
    distiller = Distiller(student, projectors, layer_map=layer_map, weights=weights, forms=forms)
    try:
        return UniversalDistillationTrainer(
            distiller,
            _training_arguments(recipe),
            data_collator=collator,
            train_dataset=datasets["train"],
            eval_dataset=datasets["eval"],
            processing_class=tokenizer,
            projector_learning_rate=projector.learning_rate,
        )
    except (ImportError, RuntimeError) as error:
        # What `report_to`, `deepspeed` and their like need and do not find.
        raise RecipeError(f"train: {' '.join(str(error).split())}") from None


def _training_arguments(recipe: Recipe) -> TrainingArguments:
    # Without an accelerator there is no memory to pin, and bf16 has to be asked of the CPU.
    has_accelerator = torch.accelerator.is_available()
    defaults = {
        "logging_steps": 10,
        "dataloader_pin_memory": has_accelerator,
        "use_cpu": not has_accelerator,
        # With the hidden term alone the student's output head gets no gradient, and DDP must be told to look.
        "ddp_find_unused_parameters": not (recipe.loss.alpha or recipe.loss.beta),
    }
    owned = {
        "output_dir": str(checkpoints_folder(recipe)),
        "remove_unused_columns": False,
        "label_names": ["labels"],
    }
    try:
        return TrainingArguments(**{**defaults, **recipe.train, **owned})
    except (ValueError, TypeError) as error:
        raise RecipeError(f"train: {' '.join(str(error).split())}") from None


def _finish(
    recipe: Recipe,
    run: RunRows,
    trainer: UniversalDistillationTrainer,
    key: Mapping[str, Any],
    *,
    first_step: int,
    seconds: float,
) -> TrainSummary:
    """Export the student and write the metrics, last: they say that the run is complete."""
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = {name: value for name, value in (logged[-1] if logged else {}).items() if name.startswith("loss")}
    num_steps = trainer.state.global_step
    trained_epochs = (trainer.state.epoch or 0.0) * (num_steps - first_step) / max(num_steps, 1)
    summary = TrainSummary(
        student=str(trained_student(recipe)),
        num_steps=num_steps,
        trained_steps=num_steps - first_step,
        losses=losses,
        tokens_per_s=run.selections["train"].num_tokens * trained_epochs / seconds,
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
    )
    if trainer.is_world_process_zero():
        facts = {"run": key, "teacher": run.store.teacher["identity"], "store": run.store.name}
        card = model_card(recipe, teacher=run.store.teacher, store=run.store.name, selections=key["selections"])
        export_student(trainer, recipe, facts, card=card)
        write_metrics(recipe, {"summary": asdict(summary), "log": trainer.state.log_history})
    return summary
