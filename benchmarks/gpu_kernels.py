"""Losses over the vocabulary beside torch's and Liger's fused ones, for benchmarks/gpu.py.

All of them start from the last state and the output head and give the gradients of both. `ours` is what training runs;
`ours_compiled` compiles what is done to a chunk of logits; `linear_cross_entropy` is torch's own, from 2.13 on, and
`liger` that of the package `liger-kernel`, where they are there. They have the cross entropy alone; `ours_kl` adds
the KL to a teacher's whole distribution, `ours_topk` that to its 64 likeliest tokens and a bucket.
"""

import importlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coldstill.pipeline.losses.chunked_loss import chunked_loss
from coldstill.pipeline.losses.divergences import Divergence
from coldstill.pipeline.losses.logits import Logits
from coldstill.pipeline.losses.logits_targets import BucketedTopk, FullDistribution
from coldstill.pipeline.losses.task import Task
from coldstill.pipeline.losses.term import Predictions
from coldstill.pipeline.losses.vocabulary_losses import vocabulary_loss
from coldstill.pipeline.models.output_head import OutputHead

# Positions, width and vocabulary.
SHAPES = {"smollm2": (8_192, 576, 49_152), "qwen2.5": (8_192, 896, 151_936)}
TINY = {"tiny": (32, 16, 384)}
REPEATS = 5
K, TEMPERATURE = 64, 2.0

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def losses_over_vocabulary(device: torch.device, *, is_tiny: bool) -> Iterator[tuple[str, Any]]:
    """Yield milliseconds, bytes above what was held, and how far the gradient is from torch's own over all logits."""
    for name, (positions, width, vocabulary) in (TINY if is_tiny else SHAPES).items():
        generator = torch.Generator().manual_seed(0)
        dtype = torch.float32 if is_tiny else torch.bfloat16
        state = torch.randn(positions, width, generator=generator).to(device, dtype)
        weight = (torch.randn(vocabulary, width, generator=generator) * width**-0.5).to(device, dtype)
        labels = torch.randint(vocabulary, (positions,), generator=generator).to(device)
        exact = gradients(dense, state[:64].float(), weight.float(), labels[:64])
        for arm, loss in arms(device, is_tiny).items():
            try:
                measured: dict[str, Any] = timed(partial(gradients, loss, state, weight, labels), device)
                if not arm.startswith(("ours_kl", "ours_topk")):
                    got = gradients(loss, state[:64], weight, labels[:64])
                    measured["distance"] = round(distance(got[0], exact[0]), 6)
            except (RuntimeError, NotImplementedError, ImportError) as error:
                measured = {"fails": str(error).strip().splitlines()[0][:200] if str(error) else type(error).__name__}
            yield f"kernel.{name}.{arm}", measured


def arms(device: torch.device, is_tiny: bool) -> dict[str, Loss]:
    found: dict[str, Loss] = {"dense": dense, "ours": ours, "ours_kl": ours_kl, "ours_topk": ours_topk}
    if not is_tiny:
        found["ours_compiled"] = compiled_chunks()
    if hasattr(F, "linear_cross_entropy"):
        found["linear_cross_entropy"] = F.linear_cross_entropy
    try:
        liger = importlib.import_module("liger_kernel.transformers")
    except ImportError:
        return found
    if device.type == "cuda":
        found["liger"] = lambda state, weight, labels: liger.LigerFusedLinearCrossEntropyLoss()(weight, state, labels)
    return found


def dense(state: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(state, weight).float(), labels)


def ours(state: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    terms = [Task(1.0)]
    return vocabulary_loss(
        terms, Predictions(labels), state_ND=state, head=OutputHead(weight), num_positions=len(state)
    )[0]


def ours_kl(state: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    target = FullDistribution(state.detach().flip(0), OutputHead(weight.detach()), TEMPERATURE)
    return with_target(state, weight, labels, target)


def ours_topk(state: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    vocabulary = len(weight)
    ids = torch.arange(K, device=state.device).mul(vocabulary // K).expand(len(state), K)
    logits = torch.linspace(4, 0, K, device=state.device).expand(len(state), K)
    normaliser = torch.full((len(state),), 13.0, device=state.device)
    return with_target(state, weight, labels, BucketedTopk(logits, ids, normaliser, TEMPERATURE, vocabulary))


def with_target(state: Tensor, weight: Tensor, labels: Tensor, target: Any) -> Tensor:
    terms = [Task(0.5), Logits(0.5, Divergence())]
    predictions = Predictions(labels, target)
    return vocabulary_loss(terms, predictions, state_ND=state, head=OutputHead(weight), num_positions=len(state))[0]


def compiled_chunks() -> Loss:
    """Return the chunked cross entropy with a chunk's part by torch's own operations, compiled."""

    @torch.compile(dynamic=True)
    def of_chunk(logits: Tensor, labels: Tensor, total: int) -> Tensor:
        return F.cross_entropy(logits.float(), labels, reduction="sum").unsqueeze(0) / total

    def loss(state: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        one = torch.ones(1, device=state.device)
        return chunked_loss(
            state, OutputHead(weight), lambda logits, chunk: of_chunk(logits, labels[chunk], len(state)), one
        )[0]

    return loss


def gradients(loss: Loss, state: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    inputs = [state.detach().requires_grad_(), weight.detach().requires_grad_()]
    return list(torch.autograd.grad(loss(*inputs, labels), inputs))


def timed(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Do some work several times, and give the least milliseconds and the most bytes beyond what was held."""
    on_gpu, seconds = device.type == "cuda", []
    work()
    held = 0
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    measured = {"ms": round(1e3 * min(seconds), 3)}
    return {**measured, "peak_bytes": torch.cuda.max_memory_allocated() - held} if on_gpu else measured


def distance(got: Tensor, exact: Tensor) -> float:
    return float((got.float() - exact).norm() / exact.norm())
