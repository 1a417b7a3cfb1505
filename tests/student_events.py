"""The events of a target beside a student's logits, as a term over the vocabulary asks for them."""

from torch import Tensor

from coldstill.pipeline.losses.divergences import Events
from coldstill.pipeline.losses.logits_targets import LogitsTarget
from coldstill.pipeline.losses.student_logits import StudentEvents, take


def events_of(target: LogitsTarget, chunk: slice, logits: Tensor) -> Events:
    request = target.request(chunk, of_forward_kl=False)
    return target.events(chunk, StudentEvents(logits) if request is None else take(logits, [request])[0])
