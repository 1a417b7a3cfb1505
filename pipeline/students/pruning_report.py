"""What was cut from a teacher and what it cost: the record `pruning.json` beside a pruned student."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from coldstill.pipeline.models import ModelParts, kept_blocks_of, text_config
from coldstill.pipeline.models.forward import mean_loss

# What machines agree on: the record is one of the files that a student's checksums hold.
_DIGITS = 4


@dataclass(frozen=True)
class JudgedRows:
    """What a student is compared with its teacher on.

    Attributes:
        rows: Token ids, [T] each.
        are_calibration: Whether they are the rows that it was made by, which flatter it.
        teacher_loss: The teacher's mean cross entropy over them, in nats a token.
    """

    rows: Sequence[Tensor]
    are_calibration: bool
    teacher_loss: float


def pruning_report(teacher: ModelParts, student: PreTrainedModel, judged: JudgedRows) -> dict[str, Any]:
    """Compare a student with its teacher: parameters, sizes, and the loss of both.

    Returns:
        JSON-able: `parameters`, `blocks`, `heads` and `key_value_heads` of a block, `mlp` and `hidden`, each of teacher
        and student, and `judged` with
        `are_calibration`, `num_tokens`, and `loss` in nats a token and `perplexity` of both.
    """
    configs = {"teacher": text_config(teacher.model.config), "student": text_config(student.config)}
    models = {"teacher": teacher.model, "student": student}
    losses = {"teacher": judged.teacher_loss, "student": mean_loss(student, judged.rows)}
    losses = {name: round(loss, _DIGITS) for name, loss in losses.items()}
    return {
        "parameters": {name: sum(value.numel() for value in model.parameters()) for name, model in models.items()},
        "blocks": {
            "teacher": len(teacher.blocks),
            "student": int(configs["student"].num_hidden_layers),
            "kept": kept_blocks_of(student.config),
        },
        "heads": {name: getattr(config, "num_attention_heads", None) for name, config in configs.items()},
        "key_value_heads": {name: getattr(config, "num_key_value_heads", None) for name, config in configs.items()},
        "mlp": {name: getattr(config, "intermediate_size", None) for name, config in configs.items()},
        "hidden": {name: int(config.hidden_size) for name, config in configs.items()},
        "judged": {
            "are_calibration": judged.are_calibration,
            "num_tokens": sum(len(row) - 1 for row in judged.rows),
            "loss": losses,
            "perplexity": {name: round(math.exp(min(loss, 700.0)), _DIGITS) for name, loss in losses.items()},
        },
    }
