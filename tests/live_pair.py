"""A student of 2 blocks beside the teacher of 4, and rows as people have them who know no store."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from coldstill.pipeline.losses.objective import Objective
from coldstill.pipeline.models.projectors import create_projectors
from coldstill.pipeline.recipe.loss import LossConfig
from coldstill.pipeline.stage_two.distiller import Distiller

LAYER_MAP = {0: 1, 1: 3}
LENGTHS = (5, 24, 11, 17, 9, 24, 13, 20)
CPU = torch.device("cpu")


def ids_of(length: int, seed: int) -> list[int]:
    # 0 is padding and end of text, which collators leave out of the labels.
    return torch.randint(1, 384, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def rows(num: int = 8, length: int = 24) -> list[dict[str, Any]]:
    return [{"input_ids": ids_of(length, seed)} for seed in range(num)]


def uneven_rows() -> list[dict[str, Any]]:
    return [{"input_ids": ids_of(length, seed)} for seed, length in enumerate(LENGTHS)]


def padded_batch(side: str) -> dict[str, torch.Tensor]:
    """The uneven rows side by side, with the labels that tutorials give them."""
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in uneven_rows():
        ids = row["input_ids"]
        for name, own, fill in (("input_ids", ids, 0), ("attention_mask", [1] * len(ids), 0), ("labels", ids, -100)):
            rest = [fill] * (max(LENGTHS) - len(ids))
            batch[name].append(rest + own if side == "left" else own + rest)
    return {name: torch.tensor(values) for name, values in batch.items()}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        **{"use_cpu": True, "dataloader_pin_memory": False, "disable_tqdm": True, "logging_steps": 1, **changes},
    )


def distiller_of(student: Any, **weights: float) -> Distiller:
    usual = {"alpha": 0.5, "beta": 0.5, "gamma": 0.1, "temperature": 2.0, "hidden": "mse"}
    objective = Objective.of(LossConfig.model_validate({**usual, **weights}))
    projectors = create_projectors(LAYER_MAP, student_dim=16, teacher_dim=32, seed=1)
    return Distiller(student, projectors, layer_map=LAYER_MAP, objective=objective)
