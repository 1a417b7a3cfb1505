"""The terms over the vocabulary in one pass over the student's logits: a chunk of positions at a time, all terms of it.

Shapes: N positions that count, C positions of a chunk, D width, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from coldstill.pipeline.losses.chunked_loss import chunked_loss
from coldstill.pipeline.losses.student_logits import StudentEvents, take
from coldstill.pipeline.losses.term import Predictions, VocabularyTerm
from coldstill.pipeline.models.counted import numbers_on
from coldstill.pipeline.models.output_head import Head


def vocabulary_loss(
    terms: Sequence[VocabularyTerm],
    predictions: Predictions,
    *,
    state_ND: Tensor,
    head: Head,
    num_positions: Tensor | float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum of terms, which carries the gradient, and each term by its name, which carries none.

    Args:
        terms: With their weights at this step.
        predictions: At the N positions.
        state_ND: The student's post-norm last states, or whatever its head makes logits of.
        head: Its output head.
        num_positions: What sums over positions are divided by.
    """
    if not terms:
        return state_ND.new_zeros((), dtype=torch.float32), {}
    scale = numbers_on([term.scale(predictions) for term in terms], state_ND.device) / num_positions

    def terms_of_chunk(logits_CV: Tensor, chunk: slice) -> Tensor:
        return torch.stack(chunk_losses(terms, predictions, chunk, logits_CV, overwrites=not head.keeps_logits)) * scale

    weights = numbers_on([term.weight for term in terms], state_ND.device)
    loss, values = chunked_loss(state_ND, head, terms_of_chunk, weights)
    return loss, dict(zip([term.name for term in terms], values.unbind(), strict=True))


def chunk_losses(
    terms: Sequence[VocabularyTerm],
    predictions: Predictions,
    chunk: slice,
    logits_CV: Tensor,
    *,
    overwrites: bool = False,
) -> list[Tensor]:
    """Return each term's sum over a chunk of positions, unscaled and unweighted.

    Args:
        terms: The terms.
        predictions: At all positions.
        chunk: Which of them the logits are of.
        logits_CV: The student's, undivided, of any floating dtype.
        overwrites: Whether the logits may be overwritten.
    """
    requests = [term.request(predictions, chunk) for term in terms]
    known = [request for request in requests if request is not None]
    if len(known) < len(requests):
        # Where one term needs all logits, all terms get them: nothing would be saved by taking some of them as well.
        taken = [StudentEvents(logits_CV)] * len(terms)
    else:
        taken = take(logits_CV, known, overwrites=overwrites)
    return [term.loss(predictions, chunk, student) for term, student in zip(terms, taken, strict=True)]
