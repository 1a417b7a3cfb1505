"""From a recipe to the trainer of stage two: student, projectors, losses and rows, each checked against the others."""

import contextlib
from pathlib import Path

import torch
from coldstill.cache.errors import ModelError, RecipeError
from coldstill.cache.manifest import Manifest
from coldstill.cache.reader import require_complete
from coldstill.pipeline.losses.objective import Objective
from coldstill.pipeline.models import (
    check_length,
    check_vocabularies,
    load_config,
    load_model,
    load_tokenizer,
    text_config,
)
from coldstill.pipeline.models.compiled_blocks import Compilation, compile_blocks
from coldstill.pipeline.models.outlines import outline_of
from coldstill.pipeline.models.pairing import check_layer_map, layer_map_of
from coldstill.pipeline.models.projectors import create_projectors
from coldstill.pipeline.outputs.run_index import RunRows
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.stage_two.arguments import arguments_here, check_row_count, check_train_section
from coldstill.pipeline.stage_two.batches import BatchCollator, BatchColumns, StoredRows
from coldstill.pipeline.stage_two.distiller import Distiller
from coldstill.pipeline.stage_two.target_forms import column_axes, logits_columns, target_forms
from coldstill.pipeline.stage_two.trainer import UniversalDistillationTrainer
from coldstill.pipeline.students.adapters import add_adapters
from coldstill.pipeline.targets.columns import columns_of
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments


def create_trainer(recipe: Recipe, run: RunRows, student_folder: Path) -> UniversalDistillationTrainer:
    """Make the trainer of a recipe, over the rows and the student that were found for it.

    Raises:
        StoreError: The store lacks a column that the recipe needs.
        RecipeError: The recipe does not fit the store or the student.
        ModelError: The student cannot be loaded, or has another vocabulary.
    """
    trust = recipe.student.trust_remote_code
    config = load_config(student_folder, trust_remote_code=trust)
    check_vocabularies(run.store.teacher["vocab_size"], config)
    check_length(config, recipe.data.sequence_length, who="student")
    arguments = arguments_here(recipe)
    check_train_section(recipe, lambda: outline_of(config, trust_remote_code=trust), arguments=arguments)
    check_row_count(recipe, len(run.selections["train"]), num_processes=arguments.world_size)
    layer_map, collator = _plan(recipe, run, config)
    # In float32: mixed precision is `train.bf16`, over float32 weights.
    student = load_model(student_folder, dtype="float32", trust_remote_code=trust)
    if recipe.student.lora is not None:
        student = add_adapters(student, recipe.student.lora, seed=recipe.seed)
    if compilation := Compilation.of(recipe.train):
        compile_blocks(student, compilation, arguments.device)
    return _make_trainer(recipe, run, student, layer_map, collator, student_folder, arguments)


def _plan(recipe: Recipe, run: RunRows, student: PreTrainedConfig) -> tuple[dict[int, int], BatchCollator]:
    """Decide the layer map and the columns of a batch, and check that the store has them."""
    loss = recipe.loss
    layer_map: dict[int, int] = {}
    if loss.needs_hidden:
        layer_map = layer_map_of(recipe.mapping, student, num_teacher_blocks=run.store.teacher["num_blocks"])
        check_layer_map(recipe, layer_map)
    manifest = Manifest(run.store)
    blocks = list(layer_map.values())
    shards = run.selections["train"].shard_names
    wanted = columns_of(recipe.targets, blocks=blocks, split="train", manifest=manifest, shards=shards)
    of_logits = logits_columns(wanted, loss.temperature) if loss.needs_logits else {}
    columns = BatchColumns(logits=of_logits, hidden=wanted.hidden)
    for selection in run.selections.values():
        require_complete(manifest, selection, columns.names(), store=run.store.path)
    return layer_map, BatchCollator(columns, column_axes(manifest, columns, shards[0]))


def _make_trainer(
    recipe: Recipe,
    run: RunRows,
    student: PreTrainedModel,
    layer_map: dict[int, int],
    collator: BatchCollator,
    student_folder: Path,
    arguments: TrainingArguments,
) -> UniversalDistillationTrainer:
    projector = recipe.projector
    projectors = create_projectors(
        layer_map,
        student_dim=int(text_config(student.config).hidden_size),
        teacher_dim=run.store.teacher["hidden_size"],
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
    objective = Objective.of(recipe.loss)
    distiller = Distiller(student, projectors, layer_map=layer_map, objective=objective, forms=forms)
    try:
        return UniversalDistillationTrainer(
            distiller,
            arguments,
            data_collator=collator,
            train_dataset=datasets["train"],
            eval_dataset=datasets["eval"],
            processing_class=tokenizer,
            projector_learning_rate=projector.learning_rate,
        )
    except torch.OutOfMemoryError:
        raise
    except (ImportError, RuntimeError, ValueError) as error:
        # What accelerate and integrations say of a machine that arguments alone do not show.
        raise RecipeError(f"train: {' '.join(str(error).split())}") from None
