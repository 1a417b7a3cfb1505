"""A transformers Trainer that may be cut off at any moment, and ends as if it had not been.

`trainer_state.json` is published last, when all else of a checkpoint has reached the disk: a checkpoint without it was
never finished. A checkpoint has all that is said and judged at its step, and what was summed up since the last log, so
that weights and log go on as they would have.
"""

import dataclasses
import functools
import json
import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from coldstill.cache.errors import StoreNotFoundError
from coldstill.cache.local_objects import sync_path
from coldstill.pipeline.outputs.kept import Kept
from coldstill.pipeline.runtime.errors import RecipeError
from coldstill.pipeline.runtime.interruptions import WaitingSignal
from coldstill.pipeline.runtime.peak_memory import peak_memory_bytes
from coldstill.pipeline.runtime.whole import write_whole
from coldstill.pipeline.stage_two.domains_trainer import DomainsTrainer

_PROGRESS_FILE = "progress.json"
_AGAIN = "run the same command again to go on"


class ResumableTrainer(DomainsTrainer):
    """A Trainer whose run does not depend on how often it was cut off.

    Takes what `transformers.Trainer` takes.

    Attributes:
        waiting: A signal that came while signals wait: the run ends when the step is done, judged and saved.
        keeps_best: Whether the best of what is judged is what the model has in the end; see `keep_best`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.waiting = WaitingSignal()
        self.keeps_best = False
        self._resumed_from: Path | None = None
        self._first_summed_step = 0
        self._seconds_before = 0.0
        self._peak_before = 0
        super().__init__(*args, **kwargs)
        self.add_callback(_Flow(self))
        self._begun = time.monotonic()

    @property
    def seconds(self) -> float:
        """The time of all the steps that this run took, those before it was cut off included."""
        return self._seconds_before + time.monotonic() - self._begun

    @property
    def peak_memory_bytes(self) -> int:
        """The most that a process of this run held."""
        return max(self._peak_before, peak_memory_bytes())

    @property
    def kept_step(self) -> int:
        """The step whose weights the model has after training: the last one, or the best where that is wanted."""
        keeps_best = self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None
        return int(self.state.best_global_step if keeps_best else self.state.global_step)

    def keep_best(self, others: Sequence[str] = ()) -> None:
        """Let the model have in the end what was best by `metric_for_best_model`: at the start, or at any step judged.

        A step that is the best so far is saved, whatever is saved besides.

        Args:
            others: Labels of eval sets, for `DomainsTrainer`.
        """
        self.keeps_best, self.others = True, others
        # Here, and not in the arguments: these would have each step saved that is judged.
        self.args.load_best_model_at_end = True

    @property
    def kept(self) -> Kept | None:
        """Which step was the best, and by what; None where the last is kept, or nothing that was judged is finite."""
        metric = self.args.metric_for_best_model
        if not self.keeps_best or metric is None or self.state.best_model_checkpoint is None:
            return None
        judged = [(entry["step"], entry[metric]) for entry in self.state.log_history if metric in entry]
        (last_step, last_value), first = judged[-1], judged[0]
        return Kept(
            measure=metric,
            step=self.kept_step,
            value=dict(judged)[self.kept_step],
            last_step=last_step,
            last_value=last_value,
            start_value=first[1] if first[0] == 0 else None,
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train to the last step, from a checkpoint where one is given; one of the last step is only loaded.

        Args:
            resume_from_checkpoint: The checkpoint; True for the newest one in the output folder that was finished.
            args: Further arguments of `transformers.Trainer.train`.
            kwargs: The same by name.

        Raises:
            RecipeError: The checkpoint is of a step behind the last one.
            StoreNotFoundError: The best checkpoint is wanted, and is gone.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_checkpoint(Path(self.args.output_dir))[1] or True
        self._resumed_from = None if isinstance(resume_from_checkpoint, bool | None) else Path(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Let the mean loss that is said at the end be of the whole run."""
        if "train_loss" in logs:
            num_steps = self.state.global_step - self._first_summed_step
            logs["train_loss"] = self._total_loss_scalar / max(num_steps, 1)
        super().log(logs, start_time)

    def sums(self) -> dict[str, Any]:
        """Return what was summed up since the last log, as JSON takes it; every process asks."""
        return {
            "loss": self._mean(self._tr_loss),
            "total_loss": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
        }

    def take_up(self, sums: dict[str, Any]) -> None:
        """Go on with the sums of a checkpoint."""
        self._tr_loss = torch.tensor(sums["loss"], device=self.args.device)
        self._total_loss_scalar = sums["total_loss"]
        self._globalstep_last_logged = sums["logged_step"]

    def _mean(self, value: Tensor) -> float:
        return float(self.accelerator.gather(value).mean().item())

    def _go_on(self) -> None:
        """Take up what a checkpoint has beside the Trainer's own."""
        if self._resumed_from is None:
            return
        state, name = self.state, self._resumed_from
        if state.global_step > state.max_steps:
            raise RecipeError(
                f"{name} is of a step behind the last one: this run has {state.max_steps} steps; remove it to go on "
                "from an earlier one, or begin anew: coldstill train --restart"
            )
        self.args.eval_on_start = False
        if state.best_global_step is not None:
            # Recorded as it was called then, perhaps from another folder.
            best = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
            state.best_model_checkpoint = str(best) if is_whole(best) else None
            if self.args.load_best_model_at_end and state.best_model_checkpoint is None:
                raise StoreNotFoundError(
                    f"{best}, the best checkpoint so far, is gone, and {self._wanted_by} wants it; begin anew: "
                    "coldstill train --restart"
                )
        progress = self._resumed_from / _PROGRESS_FILE
        if not progress.is_file():
            self._first_summed_step = state.global_step
            return
        stored = json.loads(progress.read_text())
        self.take_up(stored["sums"])
        self._seconds_before, self._peak_before = stored["seconds"], stored["peak_memory_bytes"]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # The Trainer takes a step before it asks whether there is one to take.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    @property
    def _wanted_by(self) -> str:
        return "train.keep best" if self.keeps_best else "train.load_best_model_at_end"

    def _evaluate(self, trial: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics: dict[str, float] = super()._evaluate(trial, *args, **kwargs)
        # The Trainer judges the start, but never takes it for the best.
        is_start = self.keeps_best and self.state.global_step == 0
        if is_start and self._determine_best_metric(metrics=metrics, trial=trial):
            self.control.should_save = False
            self.state.best_model_checkpoint = str(Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-0")
            self._save_checkpoint(self.model_wrapped, trial)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics=metrics, trial=trial)
        if is_best and self.args.load_best_model_at_end:
            # Whatever `save_steps` says: at the end it must be there.
            self.control.should_save = True
        return is_best or self.waiting.number is not None

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            # The Trainer's own way looks for a plain model's weights under the names of what is trained.
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is None:
            metric = self.args.metric_for_best_model
            warnings.warn(
                f"{self._wanted_by}: no evaluation gave a finite {metric}, so the last step is kept",
                stacklevel=2,
            )
        # With a limit of one the Trainer removes the last checkpoint here if another is best, and nothing is exported.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        progress = {"sums": self.sums(), "seconds": self.seconds, "peak_memory_bytes": self.peak_memory_bytes}
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
            (folder / _PROGRESS_FILE).write_text(json.dumps(progress, indent=1) + "\n")
        only_model = self.args.save_only_model
        # Where a run is cut off it is to go on, which weights alone do not let it.
        self.args.save_only_model = only_model and self.waiting.number is None
        # The Trainer writes its state in place, and then removes older checkpoints: the state must be whole by then.
        self.state.save_to_json = functools.partial(_publish_state, self.state)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            del self.state.save_to_json
            self.args.save_only_model = only_model

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The first process calls the checkpoint whole, so every other one must have written its part.
        self.accelerator.wait_for_everyone()


class _Flow(TrainerCallback):
    """Puts what is due at an epoch's last step off to the epoch's end, and ends the run when a signal waits."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self._trainer = trainer
        self._put_off = (False, False, False)

    @property
    def _is_cut_off(self) -> bool:
        return self._trainer.waiting.number is not None

    def on_train_begin(self, *_args: Any, **_: Any) -> None:
        self._trainer._go_on()

    def on_step_end(self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_save |= self._is_cut_off
        self._put_off = (False, False, False)
        if control.should_training_stop or state.epoch == int(state.epoch):
            # What an epoch's end says and judges would be lost behind a checkpoint that was saved before it.
            self._put_off = (control.should_log, control.should_evaluate, control.should_save)
            control.should_log = control.should_evaluate = control.should_save = False

    def on_epoch_end(self, _args: Any, _state: Any, control: TrainerControl, **_: Any) -> None:
        log, evaluate, save = self._put_off
        control.should_log |= log
        control.should_evaluate |= evaluate
        control.should_save |= save or self._is_cut_off

    def on_evaluate(self, _args: Any, _state: Any, control: TrainerControl, **_: Any) -> None:
        control.should_save |= self._is_cut_off

    def on_save(self, *_args: Any, **_: Any) -> None:
        self._trainer.waiting.deliver()


def newest_checkpoint(folder: Path) -> tuple[int, str | None]:
    """Return step and path of the newest checkpoint that training can go on from; 0 and None without one."""
    by_step = {_step(found): str(found) for found in _checkpoints(folder) if is_whole(found) and _leads_on(found)}
    newest = max(by_step, default=0)
    return newest, by_step.get(newest)


def sweep_checkpoints(folder: Path) -> None:
    """Remove the checkpoints in a folder that were not finished."""
    for found in _checkpoints(folder):
        if not is_whole(found):
            shutil.rmtree(found)


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was finished."""
    return (checkpoint / TRAINER_STATE_NAME).is_file()


def planned_steps(checkpoint: Path) -> int:
    """Return how many steps the run of a whole checkpoint is to have."""
    return int(json.loads((checkpoint / TRAINER_STATE_NAME).read_text())["max_steps"])


def where_it_stands(folder: Path, trainer: ResumableTrainer | None) -> str:
    """Say at which step training was cut off, and which of its checkpoints in a folder it goes on from.

    Args:
        folder: Of the checkpoints.
        trainer: What was cut off; None before there was one.
    """
    saved, _ = newest_checkpoint(folder)
    step = 0 if trainer is None else trainer.state.global_step
    if step and step == saved:
        return f"at step {step}, which is saved; {_AGAIN}"
    at = f"at step {step}" if step else "before a step was taken"
    if trainer is not None and trainer.args.world_size > 1:
        at += ", where several processes save nothing"
    return (
        f"{at}, with step {saved} saved; {_AGAIN}" if saved else f"{at}, with none saved; the same command begins anew"
    )


def _checkpoints(folder: Path) -> list[Path]:
    return list(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[-1])


def _leads_on(checkpoint: Path) -> bool:
    """Whether a whole checkpoint has what training goes on with, or is of the last step: `save_only_model` has less."""
    if (checkpoint / SCHEDULER_NAME).is_file():
        return True
    return _step(checkpoint) >= planned_steps(checkpoint)


def _publish_state(state: TrainerState, json_path: str) -> None:
    """Write the Trainer's state so that its file says that the whole checkpoint is on the disk."""
    path = Path(json_path)
    for file in path.parent.iterdir():
        sync_path(file)
    write_whole(path, json.dumps(dataclasses.asdict(state), indent=2, sort_keys=True) + "\n")
