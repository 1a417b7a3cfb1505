"""Stage two: train the student and its projectors from the store. Neither teacher nor its files are needed."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments

from cache.errors import IdentityError, ModelError
from pipeline.config import Recipe
from pipeline.models import (
    identify,
    load_config,
    resolve_dtype,
    resolve_folder,
)
from pipeline.peak_memory import peak_memory_bytes
from pipeline.places import check_places
from pipeline.run_index import RunRows, find_run_rows, trained_student
from pipeline.runs.folder import (
    check_claim,
    claim,
    export_projectors,
    export_student,
    finished_summary,
    last_checkpoint,
    remove_run,
    run_key,
    sweep_checkpoints,
    write_metrics,
)
from pipeline.runs.model_card import model_card
from pipeline.students.folders import find_student
from pipeline.trainer import UniversalDistillationTrainer
from pipeline.trainer_setup import create_trainer


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
    _check_places(recipe, student_folder)
    trainer = create_trainer(recipe, run, student_folder)
    trainer.add_callback(_ClaimAtFirstStep(recipe, key))
    if trainer.is_world_process_zero():
        sweep_checkpoints(recipe)
    started = time.monotonic()
    first_step, checkpoint = last_checkpoint(recipe)
    if checkpoint is None and recipe.projector.init == "least_squares" and recipe.loss.needs_hidden:
        trainer.fit_projectors(recipe.projector.init_rows)
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.monotonic() - started
    card = model_card(recipe, run, student_folder)
    return _finish(recipe, run, trainer, key, card=card, first_step=first_step, seconds=seconds)


class _ClaimAtFirstStep(TrainerCallback):
    """Makes the output a run's own when it has taken a step, and so before any checkpoint; until then it may fail."""

    def __init__(self, recipe: Recipe, key: Mapping[str, Any]) -> None:
        self._recipe = recipe
        self._key: Mapping[str, Any] | None = key

    def on_step_end(self, _args: TrainingArguments, state: TrainerState, _control: Any, **_: Any) -> None:
        if self._key is not None and state.is_world_process_zero:
            claim(self._recipe, self._key)
        self._key = None


def _check_places(recipe: Recipe, student_folder: Path) -> None:
    """Refuse an output that cannot be written, or that the run would write over a model that it reads."""
    models = {"teacher.path": Path(recipe.teacher.path)}
    if recipe.student.path is not None:
        models["student.path"] = student_folder
    check_places(recipe, models=models, written=("output", "local_copy"))


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


def _finish(
    recipe: Recipe,
    run: RunRows,
    trainer: UniversalDistillationTrainer,
    key: Mapping[str, Any],
    *,
    card: str,
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
    student, projectors = trainer.trained_state()
    if trainer.is_world_process_zero():
        facts = {"run": key, "teacher": run.store.teacher["identity"], "store": run.store.name}
        export_student(trainer, recipe, student, facts, card=card)
        export_projectors(recipe, projectors)
        record = {"summary": asdict(summary), "layer_map": trainer.layer_map, "log": trainer.state.log_history}
        write_metrics(recipe, record)
    return summary
