"""From a recipe to the trainer of stage two: student, projectors, losses and rows, each checked against the others."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch.utils.data import Subset
from transformers import PreTrainedConfig

from coldstill.cache.errors import ColdstillError
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
from coldstill.pipeline.runtime.errors import ModelError, RecipeError
from coldstill.pipeline.stage_two.arguments import (
    arguments_here,
    check_row_count,
    check_train_section,
    reader_threads,
)
from coldstill.pipeline.stage_two.batches import RowSet, StoredRow
from coldstill.pipeline.stage_two.distillation_trainer import UniversalDistillationTrainer
from coldstill.pipeline.stage_two.distiller import Distiller, TargetForms
from coldstill.pipeline.stage_two.target_sources import LiveRows, StoredTargets
from coldstill.pipeline.students.adapters import add_adapters


def create_trainer(
    recipe: Recipe, run: RunRows, student_folder: Path, *, live: LiveRows | None = None
) -> UniversalDistillationTrainer:
    """Make the trainer of a recipe, over the rows and the student that were found for it.

    Args:
        recipe: The recipe.
        run: Its rows, and what is known of its teacher.
        student_folder: Its student.
        live: The rows and the teacher in memory, where no store speaks for it.

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
    layer_map = _layer_map(recipe, run, config)
    source = None if live is not None else _stored_targets(recipe, run, layer_map)
    # In float32: mixed precision is `train.bf16`, over float32 weights.
    student = load_model(student_folder, dtype="float32", trust_remote_code=trust)
    if recipe.student.lora is not None:
        student = add_adapters(student, recipe.student.lora, seed=recipe.seed)
    if compilation := Compilation.of(recipe.train):
        compile_blocks(student, compilation, arguments.device)
    projectors = create_projectors(
        layer_map,
        student_dim=int(text_config(student.config).hidden_size),
        teacher_dim=run.store.teacher["hidden_size"],
        kind=recipe.projector.kind,
        learnable=recipe.projector.learnable,
        seed=recipe.seed,
    )
    tokenizer = None
    with contextlib.suppress(ModelError):
        tokenizer = load_tokenizer(student_folder, trust_remote_code=trust)
    forms = TargetForms() if source is None else source.forms
    distiller = Distiller(student, projectors, layer_map=layer_map, objective=Objective.of(recipe.loss), forms=forms)
    rows = live or source
    assert rows is not None, "rows come from a store or from memory"
    with as_error_of_train():
        trainer = UniversalDistillationTrainer(
            distiller,
            arguments,
            teacher_model=None if live is None else live.teacher_model,
            data_collator=rows.collator,
            train_dataset=rows.rows("train"),
            eval_dataset=_eval_rows(rows.rows("eval"), run.domains("eval")),
            processing_class=tokenizer,
            projector_learning_rate=recipe.projector.learning_rate,
            reader_threads=reader_threads(recipe, arguments.device),
        )
    if recipe.kept_by is not None:
        trainer.keep_best(recipe.data.other_labels)
    return trainer


def _eval_rows(rows: RowSet, domains: Mapping[str, range]) -> RowSet | dict[str, Subset[StoredRow]]:
    """Return the eval rows; where they are of several sources, those of each by its label."""
    return {label: Subset(rows, of_label) for label, of_label in domains.items()} or rows


def _layer_map(recipe: Recipe, run: RunRows, student: PreTrainedConfig) -> dict[int, int]:
    """Return student block to teacher block; nothing where block outputs are not learned from."""
    if not recipe.loss.needs_hidden:
        return {}
    layer_map = layer_map_of(recipe.mapping, student, num_teacher_blocks=run.store.teacher["num_blocks"])
    check_layer_map(recipe, layer_map)
    return layer_map


def _stored_targets(recipe: Recipe, run: RunRows, layer_map: Mapping[int, int]) -> StoredTargets:
    """Return what the store keeps for the recipe, once it is known to have all of it."""
    temperature = recipe.loss.temperature if recipe.loss.needs_logits else None
    source = StoredTargets.of_recipe(recipe, run, blocks=list(layer_map.values()), temperature=temperature)
    source.require_complete()
    return source


@contextlib.contextmanager
def as_error_of_train() -> Iterator[None]:
    """Turn into an error of the recipe what accelerate and integrations say that the arguments alone do not show.

    They say it by ImportError, for what is not installed, and by ValueError, for what does not go together. A
    RuntimeError is no mistake in the `train` section: the device has no memory left, or something is broken.

    Raises:
        RecipeError: In place of these two.
    """
    try:
        yield
    except ColdstillError:
        raise
    except (ImportError, ValueError) as error:
        raise RecipeError(f"train: {' '.join(str(error).split())}") from None
