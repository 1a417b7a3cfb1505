"""What tests of training share: the trainer that stage two would run, and the gradients of its first batch."""

from typing import Any

import torch

from pipeline.config import Recipe
from pipeline.run_index import find_run_rows
from pipeline.students.folders import find_student
from pipeline.trainer_setup import create_trainer


def trainer_of(recipe: Recipe) -> Any:
    return create_trainer(recipe, find_run_rows(recipe), find_student(recipe))


def gradients(trainer: Any) -> dict[str, torch.Tensor]:
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, batch)
    trainer.accelerator.backward(loss)
    return {name: value.grad for name, value in trainer.model.named_parameters() if value.grad is not None}
