"""What is asked of the student's logits at a chunk of positions: several requests are answered by one set of passes.

Shapes: C positions of a chunk, E tokens of a request, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coldstill.pipeline.losses.logits_statistics import Sought, logits_statistics


@dataclass(frozen=True)
class Request:
    """What to take of the student's logits at a chunk of positions.

    Attributes:
        temperature: Where to take the logsumexp over the vocabulary.
        ids_CE: The tokens whose logits to take, int64; None for none.
        has_rest: Whether to take the logsumexp of all other tokens too; those of `ids_CE` are all different then.
        teacher_logits_CV: The teacher's logits, float32 and free to be overwritten, to take KL(teacher || student) from
            them; None for no such number. Not together with a rest.
    """

    temperature: float
    ids_CE: Tensor | None = None
    has_rest: bool = False
    teacher_logits_CV: Tensor | None = None


@dataclass(frozen=True)
class StudentEvents:
    """What was taken of the student at a chunk of positions, in float32 and with its gradient.

    Attributes:
        logits_CE: Its logits of the requested tokens, undivided; of every token, and in whatever dtype they came, where
            all were requested.
        normaliser_C: Its logsumexp over the vocabulary of logits / temperature; None where all logits were requested.
        rest_C: The same over all but the requested tokens; None where it was not requested.
        kl_C: KL(teacher || student) at the temperature; None where it was not requested.
    """

    logits_CE: Tensor
    normaliser_C: Tensor | None = None
    rest_C: Tensor | None = None
    kl_C: Tensor | None = None


def take(logits_CV: Tensor, requests: Sequence[Request], *, overwrites: bool = False) -> list[StudentEvents]:
    """Take what is requested of logits of any floating dtype; the answers share one gradient.

    Args:
        logits_CV: The student's, undivided.
        requests: At most one of them has a rest or a teacher's logits.
        overwrites: Whether the logits may be overwritten, which saves as much memory as they take.
    """
    # Tokens that are set apart come last and their temperature first: `Sought` has them there.
    ordered = sorted(requests, key=_is_over_all)
    assert sum(map(_is_over_all, requests)) <= 1
    temperatures = tuple(dict.fromkeys(request.temperature for request in reversed(ordered)))
    ids = [request.ids_CE for request in ordered if request.ids_CE is not None]
    last = ordered[-1]
    sought = Sought(
        ids_CG=torch.cat(ids, dim=-1) if ids else logits_CV.new_empty(len(logits_CV), 0, dtype=torch.int64),
        temperatures=temperatures,
        num_bucketed=last.ids_CE.shape[-1] if last.has_rest and last.ids_CE is not None else 0,
        teacher_logits_CV=last.teacher_logits_CV,
        overwrites=overwrites,
    )
    statistics = logits_statistics(logits_CV, sought)
    taken: dict[int, StudentEvents] = {}
    start = 0
    for request in ordered:
        stop = start + (0 if request.ids_CE is None else request.ids_CE.shape[-1])
        taken[id(request)] = StudentEvents(
            logits_CE=statistics.logits_CG[:, start:stop],
            normaliser_C=statistics.normaliser_CR[:, temperatures.index(request.temperature)],
            rest_C=statistics.rest_C if request.has_rest else None,
            kl_C=None if request.teacher_logits_CV is None else statistics.kl_C,
        )
        start = stop
    return [taken[id(request)] for request in requests]


def _is_over_all(request: Request) -> bool:
    return request.has_rest or request.teacher_logits_CV is not None
