"""What to try next, by rule: from how a student was cut and what it retains to a change of its recipe and the reason.

Numbers in, advice out: no files, no recipe. Retention is what a student scores on tasks, divided by what its teacher
does. The thresholds are rules of thumb of recovery by distillation; what is said of the kinds of hidden loss was
measured on SmolLM2-135M, 30 to 26 blocks (docs/results.md).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pipeline.loss_config import HiddenLoss
from pipeline.presets import Cut, preset_values

LOW = 0.90  # below it: more weight to hidden states
HIGH = 0.94  # from LOW to here: more epochs; above it: done
MODEST = 0.95  # a target above it wants hidden terms and is itself what done means
GAMMA_STEP, MAX_GAMMA = 0.05, 0.3  # of `mse`
# `normalised_mse` and `cosine` do next to nothing at 0.1, where `mse` takes nearly all of a clipped step.
DOMINANT_GAMMA = 0.1
NORMALISED_GAMMA = 5.0
ALPHA_STEP = 0.1
MORE_EPOCHS = 2
_INTERVAL = 1.96  # standard errors, for 95%
_FEW_TIMES = 20

Step = Literal["samples", "alpha", "gamma", "epochs", "done"]


@dataclass(frozen=True)
class Settings:
    """How a student was cut and trained.

    Attributes:
        cut: What was cut.
        alpha: Weight of the cross entropy.
        gamma: Weight of the hidden loss, at the first step.
        hidden: Kind of it.
        num_epochs: Epochs of the run; of no effect where max_steps is above 0.
        max_steps: Steps of the run, where they and not epochs were given; else 0 or less.
    """

    cut: Cut
    alpha: float
    gamma: float
    hidden: HiddenLoss
    num_epochs: float
    max_steps: int = 0


@dataclass(frozen=True)
class Measured:
    """What the trained student retains.

    Attributes:
        retention: On tasks, averaged; or agreement with the teacher, which stands in for it.
        stderr: Its standard error; None where it is not known, as that of agreement.
        is_proxy: Whether it is agreement.
        num_samples: Questions of the smallest task.
        all_samples: Whether the tasks have no more.
        worse: What is worse than before training, while the distance to the teacher shrank; None for nothing.
    """

    retention: float
    stderr: float | None = None
    is_proxy: bool = False
    num_samples: int = 0
    all_samples: bool = False
    worse: str | None = None


@dataclass(frozen=True)
class Advice:
    """A next step.

    Attributes:
        step: What to change: the number of questions, a weight, epochs, or nothing.
        reason: Why.
        changes: Keys of the recipe, with their new values.
        notes: What else there is to know.
    """

    step: Step
    reason: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def advise_next(settings: Settings, measured: Measured, *, target: float = MODEST) -> Advice:
    """Give the next step towards a target retention, with its reason."""
    if measured.worse is not None:
        return _remember_the_task(settings, measured.worse)
    straddled = _straddled(measured, target)
    if straddled is not None and not measured.all_samples:
        return _more_samples(settings, measured, straddled, target)
    advice = _by_value(settings, measured.retention, target)
    if straddled is not None:
        return replace(advice, notes=(f"{_unclear(measured, straddled)}; the step goes by the value", *advice.notes))
    return replace(advice, notes=(_PROXY_NOTE, *advice.notes)) if measured.is_proxy else advice


_PROXY_NOTE = (
    "no task was evaluated: agreement with the teacher stands in for retention, and is stricter, as it counts each "
    "token where the likeliest one is another; name evaluate.tasks for the real one"
)


def wants_hidden_terms(cut: Cut, target: float) -> bool:
    """Whether logits alone are not expected to do: width was cut, or the target is high."""
    return cut != "depth" or target > MODEST


def is_reached(retention: float, target: float) -> bool:
    """Whether a retention is enough: above 94% for a modest target, at the target for a high or a lower one."""
    return retention > HIGH if HIGH <= target <= MODEST else retention >= target


def as_override(key: str, value: Any) -> str:
    """Write a change as the command line takes it."""
    return f"{key}=null" if value is None else f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"


def _by_value(settings: Settings, retention: float, target: float) -> Advice:
    if is_reached(retention, target):
        return _done(settings, retention, target)
    if retention < LOW:
        return _more_hidden(settings, f"retention {retention:.1%} is below {LOW:.0%}", target)
    place = f"from {LOW:.0%} to {HIGH:.0%}" if retention <= HIGH else f"below the target of {target:.1%}"
    where = f"retention {retention:.1%} is {place}"
    if settings.gamma == 0 and wants_hidden_terms(settings.cut, target):
        return _more_hidden(settings, where, target)
    return _more_epochs(settings, f"{where}: the direction is right, and more epochs go on in it")


def _done(settings: Settings, retention: float, target: float) -> Advice:
    notes = []
    if settings.gamma > 0 and not wants_hidden_terms(settings.cut, target):
        notes.append(
            "gamma may come down: only depth was cut and the target is modest, so logits alone (loss.gamma=0) may "
            "serve, and cost less"
        )
    elif settings.gamma > 0:
        notes.append("gamma may come down, where perplexity on the text or speed matter more")
    above = f"above {HIGH:.0%}" if HIGH <= target <= MODEST else f"at or above the target of {target:.1%}"
    return Advice("done", f"retention {retention:.1%} is {above}", notes=tuple(notes))


def _more_hidden(settings: Settings, where: str, target: float) -> Advice:
    """Give block outputs more weight, in the measure that their kind of loss answers to."""
    if settings.hidden != "mse":
        return _more_normalised(settings, where)
    if settings.gamma == 0 and wants_hidden_terms(settings.cut, target):
        why = {"depth": f"the target is above {MODEST:.0%}", "width": "width was cut"}
        gamma = preset_values(settings.cut, is_aggressive=False)["loss"]["gamma"]
        reason = f"{where}, and {why.get(settings.cut, 'depth and width were cut')}: hidden terms are wanted"
        return Advice("gamma", reason, {"loss.gamma": gamma})
    if settings.gamma >= MAX_GAMMA:
        return _more_epochs(settings, f"{where}, and gamma is at {settings.gamma:g}, where raising it ends")
    gamma = round(min(settings.gamma + GAMMA_STEP, MAX_GAMMA), 4)
    notes = (_DOMINANT_NOTE,) if settings.gamma >= DOMINANT_GAMMA else ()
    return Advice("gamma", f"{where}: hidden states need more weight", {"loss.gamma": gamma}, notes)


_DOMINANT_NOTE = (
    f"expect little of it: at {DOMINANT_GAMMA} the gradient of mse was measured at some fifty times that of the other "
    "terms, nearly all of a clipped step; where perplexity suffers, take loss.hidden=normalised_mse "
    f"loss.gamma={NORMALISED_GAMMA:g} instead"
)


def _more_normalised(settings: Settings, where: str) -> Advice:
    """`cosine` and `normalised_mse` are about 1 whatever the states' size: steps of 0.05 are lost on them."""
    if settings.hidden == "normalised_mse" and settings.gamma >= NORMALISED_GAMMA:
        return _more_epochs(settings, f"{where} and gamma is at {settings.gamma:g}, as far as was measured to help")
    changes: dict[str, Any] = {"loss.gamma": NORMALISED_GAMMA}
    if settings.hidden == "cosine":
        changes = {"loss.hidden": "normalised_mse", **changes}
    reason = (
        f"{where}: hidden states need more weight, and {settings.hidden} at a gamma of {DOMINANT_GAMMA} was measured "
        f"to do next to nothing; normalised_mse wants about {NORMALISED_GAMMA:g}"
    )
    return Advice("gamma", reason, changes)


def _more_epochs(settings: Settings, reason: str) -> Advice:
    if settings.max_steps > 0:
        return Advice("epochs", reason, {"train.max_steps": math.ceil(settings.max_steps * 5 / 3)})
    return Advice("epochs", reason, {"train.num_train_epochs": settings.num_epochs + MORE_EPOCHS})


def _remember_the_task(settings: Settings, worse: str) -> Advice:
    changes: dict[str, Any] = {"loss.alpha": round(settings.alpha + ALPHA_STEP, 4)}
    reason = f"the task is forgotten: {worse}, while the distance to the teacher shrank; alpha goes up"
    if settings.hidden == "mse" and settings.gamma >= DOMINANT_GAMMA:
        changes |= {"loss.hidden": "normalised_mse", "loss.gamma": NORMALISED_GAMMA}
        reason += (
            f", and mse makes room for normalised_mse: at a gamma of {DOMINANT_GAMMA} it was measured to take nearly "
            "all of a clipped step, so that alpha alone would change little"
        )
    return Advice("alpha", reason, changes)


def _straddled(measured: Measured, target: float) -> float | None:
    """Give the nearest threshold that the 95% interval of the retention holds; None where it holds none."""
    if measured.stderr is None:
        return None
    done = HIGH if HIGH <= target <= MODEST else target
    distance, nearest = min((abs(measured.retention - threshold), threshold) for threshold in {min(LOW, done), done})
    return nearest if distance < _INTERVAL * measured.stderr else None


def _more_samples(settings: Settings, measured: Measured, threshold: float, target: float) -> Advice:
    """Ask as many questions as would tell the value from the threshold, or all where that is very many."""
    assert measured.stderr is not None
    distance = abs(measured.retention - threshold)
    times = math.inf if distance == 0 else (_INTERVAL * measured.stderr / distance) ** 2
    limit = None if times > _FEW_TIMES else math.ceil(measured.num_samples * times / 100) * 100
    by_value = _by_value(settings, measured.retention, target)
    changes = " ".join(as_override(key, value) for key, value in by_value.changes.items())
    reason = f"{_unclear(measured, threshold)}, which decides the next step: ask more questions"
    note = f"by the value alone it would be {changes or 'nothing more'}: {by_value.reason}"
    return Advice("samples", reason, {"evaluate.limit": limit}, (note,))


def _unclear(measured: Measured, threshold: float) -> str:
    return f"retention {measured.retention:.1%} ± {measured.stderr:.1%} may be above or below {threshold:.1%}"
