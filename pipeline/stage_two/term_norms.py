"""The norm of each term's gradient in the student's weights, where all terms meet, over a few rows of a batch.

Each term is run and differentiated by itself: nothing of a pass is kept for the next one, and neither the gradients
that training adds up nor its random numbers are touched. It costs about a training step over these rows for each term.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from coldstill.pipeline.models.counted import COUNTED, COUNTED_STATES
from coldstill.pipeline.stage_two.distiller import Distiller


def why_no_norms(args: TrainingArguments, *, is_sharded: bool) -> str | None:
    """Say why terms' gradients cannot be told apart; None where they can.

    Args:
        args: Of the trainer.
        is_sharded: Whether the student's weights are spread over processes.
    """
    if is_sharded:
        return "the student is sharded over processes by FSDP or DeepSpeed"
    kwargs = args.gradient_checkpointing_kwargs or {}
    if args.gradient_checkpointing and isinstance(kwargs, dict) and kwargs.get("use_reentrant"):
        return "activations are checkpointed with use_reentrant"
    return None


def first_rows(batch: Mapping[str, Any], num_rows: int) -> dict[str, Any]:
    """Return the first rows of a batch: of every tensor in it, however deep; the places that count are found anew."""
    taken: dict[str, Any] = {}
    for name, value in batch.items():
        if name in (COUNTED, COUNTED_STATES):
            continue
        if isinstance(value, Tensor):
            taken[name] = value[:num_rows]
        else:
            taken[name] = first_rows(value, num_rows) if isinstance(value, Mapping) else value
    return taken


def term_norms(distiller: Distiller, batch: Mapping[str, Any]) -> Tensor:
    """Return the norm of each term's gradient in the student's weights, before its weight, in the objective's order.

    Sums over positions, not means: only what the norms are to each other means something.

    Args:
        distiller: In training mode, with the temperature of the step.
        batch: Arguments of its forward, with the targets.
    """
    parameters = [parameter for parameter in distiller.student.parameters() if parameter.requires_grad]
    device = parameters[0].device
    now = distiller.now
    devices = [device] if device.type in ("cuda", "xpu") else []
    norms = []
    try:
        # A compiled block would be compiled again for so few rows.
        with (
            torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"),
            torch.compiler.set_stance("force_eager"),
        ):
            for term in now.terms:
                distiller.now = replace(now, terms=(replace(term, weight=1.0),))
                loss = distiller(**batch, num_items_in_batch=1)["loss"]
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
                gradients = [gradient.float() for gradient in found if gradient is not None]
                norms.append(torch.nn.utils.get_total_norm(gradients))
    finally:
        distiller.now = now
    return torch.stack(norms)
