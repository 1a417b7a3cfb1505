"""The transformers Trainer over a distiller: terms logged, projectors in checkpoints, stored rows in their own order.

A checkpoint folder is the student as `save_pretrained` writes it, so that plain `from_pretrained` loads any of them,
with `projectors.safetensors` and the Trainer's own state beside it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, Subset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from coldstill.pipeline.models import first_non_finite, load_model
from coldstill.pipeline.models.labels import counts_of, weights_of
from coldstill.pipeline.runtime.errors import NonFiniteError, RecipeError
from coldstill.pipeline.runtime.whole import disk_errors
from coldstill.pipeline.stage_two.assembly import LayerMap, Projectors, assemble
from coldstill.pipeline.stage_two.balanced_trainer import BalancedTrainer
from coldstill.pipeline.stage_two.batches import EpochOrder, RowSet
from coldstill.pipeline.stage_two.checkpoint_parts import (
    PROJECTORS_FILE,
    as_it_was_saved,
    of_projectors,
    of_student,
    read_projectors,
)
from coldstill.pipeline.stage_two.completing import complete_batch
from coldstill.pipeline.stage_two.distiller import Distiller
from coldstill.pipeline.stage_two.feed import Unread
from coldstill.pipeline.stage_two.live_targets import LiveTargets
from coldstill.pipeline.stage_two.warm_start import fit_projectors
from coldstill.pipeline.students.adapters import has_adapters, load_adapters

# The scale of the teacher is measured on no more.
_SCALE_ROWS = 256


class UniversalDistillationTrainer(BalancedTrainer):
    """Train a student and its projectors, from a teacher beside it or from stored targets.

    Takes what `transformers.Trainer` takes, ordinary data sets and collators among it, with labels as every causal
    language model has them: the ids, not shifted, -100 where they do not count; or no labels, for all but padding.
    Beside them a batch may have `weights`, at least 0: what each token weighs as something to be predicted.
    The student is trained in place; checkpoints are it alone, with `projectors.safetensors` beside it.

    Args:
        model: The student, any causal language model; or a `Distiller`, which has a layer map, projectors and a loss.
        teacher_model: A teacher to learn from as training goes, in its own dtype. It is moved to the student's device,
            unless it was loaded with a device map, and never trained, wrapped or saved.
        layer_map: Student block to teacher block, as `create_layer_map` gives it; or a list, the teacher block of each.
        projectors: As `create_projectors` gives them; fresh ones where there are none.
        alpha: Weight of the cross entropy, 0 unless it is given.
        beta: Weight of the divergence times temperature squared, 1.
        gamma: Weight of the hidden loss, 0.1 where there is a layer map, else 0.
        delta: Weight of the loss of changes from each mapped block to the next, 0.
        temperature: Of the divergence, 1.
        projector_learning_rate: Of the projectors; the student's own where it is None.
        reader_threads: So many threads read rows of a store beside each other; 0.

    Raises:
        RecipeError: Arguments contradict each other, are out of range, or would have no effect.
        ModelError: Student and teacher do not fit each other.
        TargetError: A term of the loss has a weight, and nothing gives its target; also while training, where a batch
            lacks it.
    """

    # Each term is divided by the positions of the whole accumulated batch already.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Distiller | PreTrainedModel,
        *args: Any,
        teacher_model: PreTrainedModel | None = None,
        layer_map: LayerMap | None = None,
        projectors: Projectors | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        gamma: float | None = None,
        delta: float | None = None,
        temperature: float | None = None,
        projector_learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        self._projector_learning_rate = projector_learning_rate
        weights = {"alpha": alpha, "beta": beta, "gamma": gamma, "delta": delta, "temperature": temperature}
        distiller = assemble(model, teacher=teacher_model, layer_map=layer_map, projectors=projectors, weights=weights)
        self._live: LiveTargets | None = None
        self._terms: dict[str, Tensor] = {}
        self._terms_since_step = 0
        self._eval_rows: list[dict[str, Tensor]] = []
        super().__init__(distiller, *args, **kwargs)
        self.add_callback(_LossOfStep(distiller))
        if teacher_model is not None:
            self._live = LiveTargets.beside(distiller, teacher_model, self.args.device)
        _check_effects(self)

    @property
    def layer_map(self) -> dict[int, int]:
        """Student block to teacher block; empty where block outputs are not learned from."""
        return self._distiller.layer_map

    def trained_state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the whole state of student and projectors, on the first process where it is sharded; every one asks.

        The student's by its own names, the projectors' as `PROJECTORS_FILE` names them.
        """
        state = self.accelerator.get_state_dict(self.model)
        return of_student(state), of_projectors(state)

    def fit_projectors(self, num_rows: int) -> None:
        """Let the projectors begin as least-squares maps over the first train rows."""
        self._require_scales()
        fit_projectors(self._distiller, self._first_batches(num_rows))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | float | None]:
        """Return the batches of a step, each with its labels, and the sum of the weights of all their positions."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if num_items is None:
            return batches, None
        mean_weight = self._mean_weight(batches, device)
        # The Trainer's number is scaled, and not replaced: it is shared out over devices already.
        return batches, num_items if mean_weight is None else num_items * mean_weight

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | float | None = None,
    ) -> Any:
        """Compute the weighted sum of the terms, and note each of them for the next log."""
        outputs = model(**self.with_all_it_takes(inputs), num_items_in_batch=num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The count is over all processes, while DDP averages their gradients.
            outputs = {name: value * self.accelerator.num_processes for name, value in outputs.items()}
        if model.training:
            if not self._terms:
                self._terms_since_step = self.state.global_step
            for name, value in outputs.items():
                if name != "loss":
                    self._terms[name] = self._terms.get(name, torch.zeros_like(value)) + value.detach()
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,  # noqa: ARG002 - the Trainer's own signature
        ignore_keys: list[str] | None = None,  # noqa: ARG002
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the eval loss of a batch, and note its terms; targets are no predictions to gather."""
        inputs = complete_batch(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, terms = self.compute_loss(model, inputs, return_outputs=True)
        # As the Trainer counts the loss itself: a batch once for each row, of which it cuts those that are there twice.
        self._eval_rows.append(
            {name: self.gather_function(value.repeat(self.args.eval_batch_size)) for name, value in terms.items()}
        )
        return loss, None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Add each term to the eval loss, as `eval_loss_task` and so on, averaged over the same rows."""
        self._eval_rows = []
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        names = self._eval_rows[0] if self._eval_rows else ()
        rows = {name: torch.cat([batch[name] for batch in self._eval_rows]) for name in names}
        finite = rows["loss"].isfinite() if rows and self.filters_losses else slice(None)
        for name in sorted(rows.keys() - {"loss"}):
            output.metrics[f"{metric_key_prefix}_{name}"] = rows[name][finite].mean().item()
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each term, averaged over the steps since the last log, to the Trainer's own loss."""
        if "loss" in logs and self._terms:
            num_steps = self.state.global_step - self._terms_since_step
            for name, total in sorted(self._terms.items()):
                logs[name] = self.accelerator.gather(total).mean().item() / num_steps
            if not all(math.isfinite(logs[name]) for name in self._terms):
                self.require_finite()
            self._terms = {}
            logs |= self._distiller.now.moving_values()
        super().log(logs, start_time)

    def require_finite(self) -> None:
        """Refuse to go on with weights that are not finite: nothing brings them back.

        Raises:
            NonFiniteError: A weight of student or projectors is a NaN or an infinity.
        """
        if name := first_non_finite(dict(self._distiller.named_parameters())):
            raise NonFiniteError(
                f"training has diverged: {name} is not finite at step {self.state.global_step}, and nothing is "
                f"exported; lower train.learning_rate ({self.args.learning_rate:g}) or raise train.warmup_steps, and "
                "begin anew: coldstill train --restart"
            )

    def sums(self) -> dict[str, Any]:
        """Return the sums of the terms too."""
        terms = {name: self._mean(total) for name, total in self._terms.items()}
        return {**super().sums(), "terms": terms, "terms_since_step": self._terms_since_step}

    def take_up(self, sums: dict[str, Any]) -> None:
        """Go on with the sums of the terms too."""
        super().take_up(sums)
        self._terms = {name: torch.tensor(total, device=self.args.device) for name, total in sums["terms"].items()}
        self._terms_since_step = sums["terms_since_step"]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the optimizer over student and projectors; the latter in groups of their own where they have a rate."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._projector_learning_rate is not None:
            of_projectors = {id(parameter) for parameter in self._distiller.projectors.parameters()}
            _split_groups(optimizer, of_projectors, self._projector_learning_rate)
        return optimizer

    def _mean_weight(self, batches: Sequence[Mapping[str, Any]], device: torch.device) -> Tensor | None:
        """Return what a position weighs on average, over the batches of a step that the Trainer counts together.

        None where all that count weigh 1.
        """
        is_counted_together = self.args.average_tokens_across_devices and self.args.world_size > 1
        if not is_counted_together and all(batch.get("weights") is None for batch in batches):
            return None
        sums = torch.zeros(2, device=device)
        for batch in batches:
            counts_BT, weights_BT = counts_of(batch), weights_of(batch)
            num_positions = counts_BT.sum()
            total = num_positions if weights_BT is None else weights_BT.sum()
            sums += torch.stack([total, num_positions]).to(device)
        if is_counted_together:
            # In every step: weights may be in the batch of one process and in that of no other.
            sums = self.accelerator.gather(sums.unsqueeze(0)).sum(dim=0)
        total, num_positions = sums
        return torch.where(num_positions > 0, total / num_positions, 1.0)

    def with_all_it_takes(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch with the live teacher's targets; the first time, measure the scale of the teacher's blocks."""
        self._require_scales()
        return self._with_targets(batch)

    def _with_targets(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch if self._live is None else {**batch, **self._live(batch)}

    def _first_batches(self, num_rows: int) -> Iterator[dict[str, Any]]:
        """Return the first train rows in batches, with targets; every process has the same."""
        if not hasattr(self.train_dataset, "__len__"):
            raise RecipeError(
                "train_dataset has no length: what is measured on its first rows, projectors and the scale of "
                "standardised_mse, needs one that has"
            )
        num_rows, size = min(num_rows, len(self.train_dataset)), self.args.per_device_train_batch_size
        rows = Subset(self.train_dataset, range(num_rows))
        collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
        device = next(self._distiller.parameters()).device
        for start in range(0, num_rows, size):
            batch = collate(rows.__getitems__(list(range(start, min(start + size, num_rows)))))
            yield self._with_targets(send_to_device(complete_batch(batch), device))

    def _require_scales(self) -> None:
        if self._distiller.lacks_scales:
            self._distiller.measure_scales(self._first_batches(_SCALE_ROWS))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, RowSet | Unread):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochOrder(len(dataset), seed=seed)

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        state = self._distiller.state_dict() if state_dict is None else state_dict
        student, projectors = of_student(state), of_projectors(state)
        with disk_errors(folder):
            self._distiller.student.save_pretrained(folder, state_dict=student, is_main_process=self.args.should_save)
            if projectors and self.args.should_save:
                save_file(projectors, folder / PROJECTORS_FILE)
        if not self.args.should_save:
            return
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        # Not the arguments, which the Trainer would pickle here and nobody reads: training goes on with those of its
        # own recipe. What the Trainer itself adds, optimizer.pt, scheduler.pt and rng_state.pth, stays in torch's
        # format, since it reads these files back; it does so with `weights_only`, and so runs no code of theirs.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        distiller = self._distiller
        folder = Path(resume_from_checkpoint)
        with as_it_was_saved(folder):
            if has_adapters(distiller.student):
                load_adapters(distiller.student, folder)
            else:
                dtype = str(next(distiller.student.parameters()).dtype).removeprefix("torch.")
                distiller.student.load_state_dict(load_model(folder, dtype=dtype).state_dict())
            if of_projectors(distiller.state_dict()):
                distiller.projectors.load_state_dict(read_projectors(folder))


def _check_effects(trainer: Trainer) -> None:
    """Refuse what the Trainer takes and a loss that is computed here never asks."""
    extras = ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")
    idle = [name for name in extras if getattr(trainer, name) is not None]
    idle += ["label_smoothing_factor"] * (trainer.args.label_smoothing_factor != 0)
    if idle:
        raise RecipeError(f"{', '.join(idle)} would have no effect: the loss and its terms are all that is computed")


class _LossOfStep(TrainerCallback):
    """Sets the weights of each step, which are a function of the step alone."""

    def __init__(self, distiller: Distiller) -> None:
        self._distiller = distiller

    def on_step_begin(self, _args: TrainingArguments, state: TrainerState, _control: Any, **_: Any) -> None:
        self._distiller.set_step(state.global_step, state.max_steps)


def _split_groups(optimizer: torch.optim.Optimizer, chosen: set[int], learning_rate: float) -> None:
    """Move chosen parameters out of each of the optimizer's groups into a group with another learning rate."""
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
            options = {key: value for key, value in group.items() if key not in ("params", "lr")}
            optimizer.add_param_group({**options, "params": moved, "lr": learning_rate})
