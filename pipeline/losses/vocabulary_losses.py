"""Cross entropy and divergence over the logits of a chunk of positions, in as few passes as it takes.

Shapes: C positions of a chunk, E events, V vocabulary.
"""

from dataclasses import replace

import torch
from coldstill.pipeline.losses.divergences import Divergence, Events
from coldstill.pipeline.losses.logits_statistics import LogitsStatistics, Sought, logits_statistics
from coldstill.pipeline.losses.logits_targets import FullDistribution, LogitsTarget, StudentEvents
from coldstill.pipeline.losses.terms import cross_entropy
from torch import Tensor


def vocabulary_losses(
    logits_CV: Tensor,
    *,
    chunk: slice,
    next_tokens_C: Tensor | None,
    target: LogitsTarget | None,
    divergence: Divergence,
    overwrites: bool = False,
) -> list[Tensor]:
    """Give the sums over positions of the cross entropy and of the divergence, those of the two that are asked for.

    Args:
        logits_CV: The student's, undivided, of any floating dtype.
        chunk: Which of the target's positions these are.
        next_tokens_C: The tokens that follow, int64; None for no cross entropy.
        target: The teacher's distribution; None for no divergence.
        divergence: Of the student's distribution from the teacher's.
        overwrites: Whether the logits may be overwritten.
    """
    if isinstance(target, FullDistribution) and divergence.name != "forward_kl":
        tasks = [] if next_tokens_C is None else [cross_entropy(logits_CV, next_tokens_C, num_positions=1)]
        return [*tasks, divergence(target.events(chunk, logits_CV.float())).sum()]
    sought = _sought(logits_CV, chunk, next_tokens_C, target)
    statistics = logits_statistics(logits_CV, replace(sought, overwrites=overwrites))
    losses = []
    if next_tokens_C is not None:
        losses.append((statistics.normaliser_CR[:, -1] - statistics.logits_CG[:, 0]).sum())
    if isinstance(target, FullDistribution):
        assert statistics.kl_C is not None
        losses.append(statistics.kl_C.sum())
    elif target is not None:
        student = _student_events(statistics, num_labels=int(next_tokens_C is not None))
        losses.append(divergence(target.events(chunk, student)).sum())
    return losses


def events_of(target: LogitsTarget, chunk: slice, logits_CV: Tensor) -> Events:
    """Give the events of some of a target's positions beside a student's logits there."""
    if isinstance(target, FullDistribution):
        return target.events(chunk, logits_CV)
    statistics = logits_statistics(logits_CV, _sought(logits_CV, chunk, None, target))
    return target.events(chunk, _student_events(statistics, num_labels=0))


def _sought(logits_CV: Tensor, chunk: slice, next_tokens_C: Tensor | None, target: LogitsTarget | None) -> Sought:
    """Ask for the target's numbers first, at its temperature, and for the label's logit first of all tokens."""
    ids = [] if next_tokens_C is None else [next_tokens_C.unsqueeze(-1)]
    temperatures = [] if target is None else [target.temperature]
    if next_tokens_C is not None and 1.0 not in temperatures:
        temperatures.append(1.0)
    num_bucketed, teacher_logits_CV = 0, None
    if isinstance(target, FullDistribution):
        teacher_logits_CV = target.logits(chunk)
    elif target is not None:
        ids.append(target.event_ids[chunk])
        num_bucketed = ids[-1].shape[-1] if target.has_rest else 0
    ids_CG = torch.cat(ids, dim=-1) if ids else logits_CV.new_empty(len(logits_CV), 0, dtype=torch.int64)
    return Sought(ids_CG, tuple(temperatures), num_bucketed, teacher_logits_CV)


def _student_events(statistics: LogitsStatistics, *, num_labels: int) -> StudentEvents:
    return StudentEvents(statistics.logits_CG[:, num_labels:], statistics.normaliser_CR[:, 0], statistics.rest_C)
