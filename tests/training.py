"""What tests of training share: the trainer of stage two, the gradients of its first batch, runs that die."""

from typing import Any

import pytest
import torch

from coldstill.pipeline.outputs.run_index import find_run_rows
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.stage_two.distillation_trainer import UniversalDistillationTrainer
from coldstill.pipeline.stage_two.setup import create_trainer
from coldstill.pipeline.students.folders import find_student
from coldstill.pipeline.train import train


def trainer_of(recipe: Recipe) -> Any:
    return create_trainer(recipe, find_run_rows(recipe), find_student(recipe))


def gradients(trainer: Any) -> dict[str, torch.Tensor]:
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, batch)
    trainer.accelerator.backward(loss)
    return {name: value.grad for name, value in trainer.model.named_parameters() if value.grad is not None}


def train_and_die(recipe: Recipe, *, at_step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and die at the beginning of a step."""
    step = UniversalDistillationTrainer.training_step

    def dying_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == at_step:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(UniversalDistillationTrainer, "training_step", dying_step)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)


def without_times(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in entry.items() if "runtime" not in key and "per_second" not in key}
        for entry in log
    ]
