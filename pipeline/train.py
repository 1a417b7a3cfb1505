"""Stage two: train the student and its projectors from the store. Neither teacher nor its files are needed.

They are where a recipe asks for it: `targets.source: live` keeps the teacher beside the student, and has no store.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments

from coldstill.cache.errors import IdentityError
from coldstill.pipeline.models import (
    identify,
    load_config,
    resolve_dtype,
    resolve_folder,
)
from coldstill.pipeline.outputs.kept import Kept
from coldstill.pipeline.outputs.places import check_places
from coldstill.pipeline.outputs.run_index import RunRows, find_run_rows, trained_student
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.runtime.errors import ModelError
from coldstill.pipeline.runtime.interruptions import signals_wait, what_stays
from coldstill.pipeline.stage_two.distillation_trainer import UniversalDistillationTrainer
from coldstill.pipeline.stage_two.model_card import model_card
from coldstill.pipeline.stage_two.resumable_trainer import newest_checkpoint, sweep_checkpoints, where_it_stands
from coldstill.pipeline.stage_two.run_folder import (
    check_claim,
    checkpoints_folder,
    claim,
    export_projectors,
    export_student,
    finished_summary,
    remove_run,
    run_key,
    write_metrics,
)
from coldstill.pipeline.stage_two.setup import create_trainer
from coldstill.pipeline.stage_two.target_sources import LiveRows
from coldstill.pipeline.students.folders import find_student


@dataclass(frozen=True)
class TrainSummary:
    """What a run of stage two did.

    Attributes:
        student: The exported student's folder.
        num_steps: Optimizer steps of the whole run.
        trained_steps: Of these, the ones taken now; 0 where the run was complete.
        losses: The last logged loss and its terms.
        tokens_per_s: Over the steps of the whole run.
        seconds: Time of these steps, also where the run was interrupted in between.
        peak_memory_bytes: The most that a process of the run held, on its accelerator where it has one.
        exported_step: The step whose student was exported: the last one, or the best by `train.keep` or
            `train.load_best_model_at_end`.
        kept: With `train.keep: best`, what the best step was the best by; None elsewhere.
    """

    student: str
    num_steps: int
    trained_steps: int
    losses: dict[str, float]
    tokens_per_s: float
    seconds: float
    peak_memory_bytes: int
    exported_step: int
    kept: Kept | None = None


def train(recipe: Recipe, *, restart: bool = False) -> TrainSummary:
    """Train the recipe's student, from the last complete checkpoint where there is one, and export it.

    Args:
        recipe: The recipe.
        restart: Begin anew, and remove what an earlier run of this output left.

    Raises:
        StoreError: The store lacks what the recipe needs, or belongs to another teacher.
        RecipeError: The recipe does not fit the store or the student, or the output holds another run.
        KeyboardInterrupt: Raised once the step is finished and saved; at once by a second SIGINT, in other threads than
            the main one, and where several processes train. SIGTERM waits likewise.
    """
    trainer = None
    with what_stays(lambda: _what_stays(recipe, trainer)):
        run, student_folder, live = _material(recipe)
        key = run_key(recipe, run)
        if restart:
            remove_run(recipe)
        check_claim(recipe, key)
        finished = finished_summary(recipe)
        if finished is not None:
            return _complete(finished)
        _check_places(recipe, student_folder)
        trainer = create_trainer(recipe, run, student_folder, live=live)
        trainer.add_callback(_ClaimAtFirstStep(recipe, key))
        if trainer.is_world_process_zero():
            sweep_checkpoints(checkpoints_folder(recipe))
        # Several processes would have to agree on the step.
        with signals_wait(may_wait=trainer.args.world_size == 1) as trainer.waiting:
            first_step = _learn(recipe, trainer)
            card = model_card(recipe, run, student_folder)
            return _finish(recipe, run, trainer, key, card=card, first_step=first_step)


def _complete(finished: Mapping[str, Any]) -> TrainSummary:
    """Return the summary of a run that was complete already, whichever version wrote it."""
    kept = finished.get("kept")
    known = {"exported_step": finished["num_steps"], **finished, "kept": kept and Kept(**kept)}
    return TrainSummary(**{**known, "trained_steps": 0})


def _material(recipe: Recipe) -> tuple[RunRows, Path, LiveRows | None]:
    """Find the recipe's rows and its student; and the teacher, where no store speaks for it."""
    if recipe.targets.is_live:
        # Imported here: where a store speaks for the teacher, nothing that loads one is.
        from coldstill.pipeline.stage_one.live_run import gather_live

        live = gather_live(recipe, trains_here=True)
        return live.run, live.student, live
    run = find_run_rows(recipe)
    _check_teacher(recipe, run)
    return run, find_student(recipe), None


def _what_stays(recipe: Recipe, trainer: UniversalDistillationTrainer | None) -> str:
    if finished_summary(recipe) is not None:
        return "when the run was complete: the student is exported"
    return where_it_stands(checkpoints_folder(recipe), trainer)


def _learn(recipe: Recipe, trainer: UniversalDistillationTrainer) -> int:
    """Train from the last checkpoint that is there, and return its step."""
    first_step, checkpoint = newest_checkpoint(checkpoints_folder(recipe))
    if checkpoint is None and recipe.projector.init == "least_squares" and recipe.loss.needs_hidden:
        trainer.fit_projectors(recipe.projector.init_rows)
    trainer.train(resume_from_checkpoint=checkpoint)
    return first_step


class _ClaimAtFirstStep(TrainerCallback):
    """Makes the output a run's own when it has taken a step, and so before any checkpoint; until then it may fail.

    The start may be judged before that, and then be a checkpoint itself.
    """

    def __init__(self, recipe: Recipe, key: Mapping[str, Any]) -> None:
        self._recipe = recipe
        self._key: Mapping[str, Any] | None = key

    def on_step_end(self, _args: TrainingArguments, state: TrainerState, _control: Any, **_: Any) -> None:
        if self._key is not None and state.is_world_process_zero:
            claim(self._recipe, self._key)
        self._key = None

    on_evaluate = on_step_end


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
) -> TrainSummary:
    """Export the student and write the metrics, last: they say that the run is complete."""
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = {name: value for name, value in (logged[-1] if logged else {}).items() if name.startswith("loss")}
    num_steps, seconds = trainer.state.global_step, trainer.seconds
    summary = TrainSummary(
        student=str(trained_student(recipe)),
        num_steps=num_steps,
        trained_steps=num_steps - first_step,
        losses=losses,
        tokens_per_s=run.selections["train"].num_tokens * (trainer.state.epoch or 0.0) / seconds,
        seconds=seconds,
        peak_memory_bytes=trainer.peak_memory_bytes,
        exported_step=trainer.kept_step,
        kept=trainer.kept,
    )
    trainer.require_finite()
    student, projectors = trainer.trained_state()
    if trainer.is_world_process_zero():
        facts = {"run": key, "teacher": run.store.teacher["identity"], "store": run.store.name}
        export_student(trainer, recipe, student, facts, card=card)
        export_projectors(recipe, projectors)
        record = {"summary": asdict(summary), "layer_map": trainer.layer_map, "log": trainer.state.log_history}
        write_metrics(recipe, record)
    return summary
