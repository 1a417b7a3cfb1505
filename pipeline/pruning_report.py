"""What was cut from a teacher and what it cost: the record `pruning.json` beside a pruned student."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.forward import pad_rows
from pipeline.models import ModelParts, kept_blocks_of, text_config

_BATCH = 4
_IGNORED = -100


def pruning_report(teacher: ModelParts, student: PreTrainedModel, rows: Sequence[Tensor]) -> dict[str, Any]:
    """Compare a student with its teacher: parameters, sizes, and the loss of both on calibration rows.

    Args:
        teacher: The teacher.
        student: What was made of it.
        rows: Token ids, [T] each.

    Returns:
        JSON-able: `parameters`, `blocks`, `mlp` and `hidden`, each of teacher and student, and `calibration` with
        `num_tokens`, and `loss` in nats a token and `perplexity` of both.
    """
    configs = {"teacher": text_config(teacher.model.config), "student": text_config(student.config)}
    models = {"teacher": teacher.model, "student": student}
    losses = {name: calibration_loss(model, rows) for name, model in models.items()}
    return {
        "parameters": {name: sum(value.numel() for value in model.parameters()) for name, model in models.items()},
        "blocks": {
            "teacher": len(teacher.blocks),
            "student": int(configs["student"].num_hidden_layers),
            "kept": kept_blocks_of(student.config),
        },
        "mlp": {name: getattr(config, "intermediate_size", None) for name, config in configs.items()},
        "hidden": {name: int(config.hidden_size) for name, config in configs.items()},
        "calibration": {
            "num_tokens": sum(len(row) - 1 for row in rows),
            "loss": losses,
            "perplexity": {name: math.exp(min(loss, 700.0)) for name, loss in losses.items()},
        },
    }


@torch.inference_mode()
def calibration_loss(model: PreTrainedModel, rows: Sequence[Tensor]) -> float:
    """Give a model's mean cross entropy over rows of token ids [T], in nats a token."""
    device = next(model.parameters()).device
    total, num_tokens = 0.0, 0
    for start in range(0, len(rows), _BATCH):
        ids_BT, mask_BT = pad_rows(rows[start : start + _BATCH], device=device)
        labels_BT = ids_BT.masked_fill(~mask_BT, _IGNORED)
        count = int(mask_BT[:, 1:].sum())
        loss = model(input_ids=ids_BT, attention_mask=mask_BT.long(), labels=labels_BT, use_cache=False).loss
        total, num_tokens = total + float(loss) * count, num_tokens + count
    return total / num_tokens
