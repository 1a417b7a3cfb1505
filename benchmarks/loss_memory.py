"""The memory of the loss over a large vocabulary, dense or in chunks: an arm of benchmarks/train_step.py.

    python benchmarks/loss_memory.py dense | chunked

Half cross entropy, half bucketed KL to 64 stored logits at temperature 2, forward and backward, over 2,048 positions, a
width of 896 and a vocabulary of 151,936, as Qwen2.5-0.5B has; in float32. Prints one JSON object: what the process held
at most above what it held before, the loss, and the norms of both gradients. With `both`, how far the loss and the
gradients of the two are apart, relative to their norm.
"""

import json
import sys

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from coldstill.pipeline.losses.divergences import Divergence
from coldstill.pipeline.losses.logits import Logits
from coldstill.pipeline.losses.logits_targets import BucketedTopk
from coldstill.pipeline.losses.student_logits import StudentEvents
from coldstill.pipeline.losses.task import Task
from coldstill.pipeline.losses.term import Predictions
from coldstill.pipeline.losses.vocabulary_losses import vocabulary_loss
from coldstill.pipeline.models.output_head import OutputHead
from coldstill.pipeline.runtime.peak_memory import peak_memory_bytes

POSITIONS, WIDTH, VOCABULARY, K, TEMPERATURE = 2_048, 896, 151_936, 64, 2.0
KL = Divergence()


def main() -> None:
    arm = sys.argv[1]
    state, head, labels, target = inputs()
    if arm == "both":
        print(json.dumps(distances(state, head, labels, target)))
        return
    before = psutil.Process().memory_info().rss
    loss, *gradients = (dense if arm == "dense" else chunked)(state, head, labels, target)
    peak = peak_memory_bytes() - before
    norms = [values.norm().item() for values in gradients]
    of_gradients = sum(values.nbytes for values in gradients)
    print(json.dumps({"peak_bytes": peak, "gradient_bytes": of_gradients, "loss": loss.item(), "norms": norms}))


def inputs() -> tuple[Tensor, OutputHead, Tensor, BucketedTopk]:
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(POSITIONS, WIDTH, generator=generator).requires_grad_()
    # In place: what its making took must not hide what the loss takes.
    weight = torch.empty(VOCABULARY, WIDTH).normal_(std=WIDTH**-0.5, generator=generator)
    head = OutputHead(weight.requires_grad_())
    labels = torch.randint(VOCABULARY, (POSITIONS,), generator=generator)
    logits = torch.randn(POSITIONS, K, generator=generator).sort(descending=True).values + 4
    ids = torch.randint(VOCABULARY // K, (POSITIONS, K), generator=generator) * K + torch.arange(K)
    return state, head, labels, BucketedTopk(logits, ids, torch.full((POSITIONS,), 13.0), TEMPERATURE, VOCABULARY)


def dense(state: Tensor, head: OutputHead, labels: Tensor, target: BucketedTopk) -> tuple[Tensor, Tensor, Tensor]:
    """All logits at once, by torch's own operations."""
    logits = F.linear(state, head.weight_VD)
    task = F.cross_entropy(logits, labels)
    divided = logits / TEMPERATURE
    ids, normaliser = target.top_ids_NK, divided.logsumexp(dim=-1)
    rest = divided.scatter(-1, ids, -torch.inf).logsumexp(dim=-1)
    events = target.events(slice(0, POSITIONS), StudentEvents(logits.gather(-1, ids), normaliser, rest))
    loss = 0.5 * task + 0.5 * KL(events).sum() * TEMPERATURE**2 / POSITIONS
    return loss.detach(), *torch.autograd.grad(loss, [state, head.weight_VD])


def chunked(state: Tensor, head: OutputHead, labels: Tensor, target: BucketedTopk) -> tuple[Tensor, Tensor, Tensor]:
    """As training does it."""
    terms = [Task(0.5), Logits(0.5, KL)]
    predictions = Predictions(labels, target)
    loss, _ = vocabulary_loss(terms, predictions, state_ND=state, head=head, num_positions=POSITIONS)
    return loss.detach(), *torch.autograd.grad(loss, [state, head.weight_VD])


def distances(*arguments: object) -> dict[str, float]:
    pairs = zip(dense(*arguments), chunked(*arguments), strict=True)
    named = zip(("loss", "state_gradient", "weight_gradient"), pairs, strict=True)
    return {name: ((got - want).norm() / want.norm()).item() for name, (want, got) in named}


if __name__ == "__main__":
    main()
