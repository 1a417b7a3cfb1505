"""What to try next, by rule: from how a student was cut and what it retains to a change of its recipe and the reason.

Numbers in, advice out: no files, no recipe. Retention is what a student scores on tasks, divided by what its teacher
does. The thresholds are rules of thumb of recovery by distillation; what is said of the kinds of hidden loss was
measured on SmolLM2-135M, 30 to 26 blocks (docs/results.md).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from coldstill.pipeline.outputs.retention import INTERVAL
from coldstill.pipeline.recipe.loss import HiddenLoss
from coldstill.pipeline.recipe.presets import Cut

LOW = 0.90  # below it: more weight to hidden states
HIGH = 0.94  # from LOW to here: more epochs; above it: done
MODEST = 0.95  # a target above it wants hidden terms and is itself what done means
GAMMA_STEP, MAX_GAMMA = 0.05, 0.3  # of `mse`
FIRST_GAMMA: Mapping[Cut, float] = {"depth": 0.1, "width": 0.2, "both": 0.2}  # the book's
# `normalised_mse` and `cosine` do next to nothing at 0.1.
SMALL_GAMMA = 0.1
NORMALISED_GAMMA = 5.0
# Raw squared errors have no scale that holds across models: what `mse` makes up of a run's own loss says whether more
# of it can help. From here on it decides the step, and takes from the other terms what it gets.
DOMINANT_SHARE = 0.5
ALPHA_STEP = 0.1
MORE_EPOCHS = 2
ENOUGH_EPOCHS = 0.9  # below it rows were never seen, and nothing is known of what the rest of the recipe does
_FEW_TIMES = 20

Step = Literal["samples", "alpha", "gamma", "epochs", "rows", "done"]


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
        max_rows: Train rows that the recipe takes of its source; None for all of them.
        seen_epochs: How often the run saw its rows; None where nothing says so.
        hidden_share: What the weighted hidden loss made up of the loss at the end; None where nothing was logged.
        rising: What says that the eval loss had begun to rise; None where it had not, or was not looked at.
    """

    cut: Cut
    alpha: float
    gamma: float
    hidden: HiddenLoss
    num_epochs: float
    max_steps: int = 0
    max_rows: int | None = None
    seen_epochs: float | None = None
    hidden_share: float | None = None
    rising: str | None = None

    @property
    def is_short(self) -> bool:
        """Whether the run ended before it had seen its rows."""
        return self.seen_epochs is not None and self.seen_epochs < ENOUGH_EPOCHS

    @property
    def mse_decides(self) -> bool:
        """Whether raw squared errors decide the step already."""
        return self.hidden == "mse" and (self.hidden_share or 0.0) >= DOMINANT_SHARE


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
        step: What to change: the number of questions, a weight, epochs, rows, or nothing.
        reason: Why.
        changes: Keys of the recipe, with their new values.
        notes: What else there is to know.
    """

    step: Step
    reason: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def advise_next(settings: Settings, measured: Measured, *, target: float = MODEST) -> Advice:
    """Return the next step towards a target retention, with its reason."""
    if settings.is_short and not is_reached(measured.retention, target):
        return _see_the_rows(settings, notes=(_PROXY_NOTE,) if measured.is_proxy else ())
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
    if retention < LOW and settings.hidden != "standardised_mse":
        return _more_hidden(settings, f"retention {retention:.1%} is below {LOW:.0%}", target)
    if retention < LOW:
        where = f"retention {retention:.1%} is below {LOW:.0%}"
        return _more_epochs(settings, where, ": more text helped, and hidden terms beside it did not")
    place = f"from {LOW:.0%} to {HIGH:.0%}" if retention <= HIGH else f"below the target of {target:.1%}"
    where = f"retention {retention:.1%} is {place}"
    if settings.gamma == 0 and settings.hidden != "standardised_mse" and wants_hidden_terms(settings.cut, target):
        return _more_hidden(settings, where, target)
    return _more_epochs(settings, where, ": the direction is right, and more epochs go on in it")


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
    """Return block outputs more weight, in the measure that their kind of loss answers to."""
    if settings.hidden != "mse":
        return _more_normalised(settings, where)
    if settings.gamma == 0 and wants_hidden_terms(settings.cut, target):
        why = {"depth": f"the target is above {MODEST:.0%}", "width": "width was cut"}
        reason = f"{where}, and {why.get(settings.cut, 'depth and width were cut')}: hidden terms are wanted"
        return Advice("gamma", reason, {"loss.gamma": FIRST_GAMMA[settings.cut]})
    if settings.mse_decides:
        reason = (
            f"{where}: hidden states need more weight, but mse at a gamma of {settings.gamma:g} makes up "
            f"{settings.hidden_share:.0%} of the loss already and takes from the other terms what it gets; "
            f"normalised_mse at {NORMALISED_GAMMA:g} leaves them their part"
        )
        return Advice("gamma", reason, {"loss.hidden": "normalised_mse", "loss.gamma": NORMALISED_GAMMA})
    if settings.gamma >= MAX_GAMMA:
        return _more_epochs(settings, f"{where}, and gamma is at {settings.gamma:g}, where raising it ends")
    gamma = round(min(settings.gamma + GAMMA_STEP, MAX_GAMMA), 4)
    return Advice("gamma", f"{where}: hidden states need more weight", {"loss.gamma": gamma})


def _more_normalised(settings: Settings, where: str) -> Advice:
    """`cosine` and `normalised_mse` are about 1 whatever the states' size: steps of 0.05 are lost on them."""
    if settings.hidden == "normalised_mse" and settings.gamma >= NORMALISED_GAMMA:
        return _more_epochs(settings, f"{where} and gamma is at {settings.gamma:g}, as far as was measured to help")
    changes: dict[str, Any] = {"loss.gamma": NORMALISED_GAMMA}
    if settings.hidden == "cosine":
        changes = {"loss.hidden": "normalised_mse", **changes}
    reason = (
        f"{where}: hidden states need more weight, and {settings.hidden} at a gamma of {SMALL_GAMMA} was measured "
        f"to do next to nothing; normalised_mse wants about {NORMALISED_GAMMA:g}"
    )
    return Advice("gamma", reason, changes)


def _more_epochs(settings: Settings, where: str, why: str = ": more epochs are left") -> Advice:
    """Train for longer; where the eval loss says that the rows are learned by heart, on more of them."""
    if settings.rising is not None:
        if settings.max_rows is None:
            reason = (
                f"{where}, but {settings.rising}: name a longer source in data.train, all rows of this one were read"
            )
            return Advice("rows", reason)
        reason = f"{where}, but {settings.rising}: more rows rather than epochs"
        return Advice("rows", reason, {"data.train.max_rows": 2 * settings.max_rows})
    if settings.max_steps > 0:
        return Advice("epochs", f"{where}{why}", {"train.max_steps": math.ceil(settings.max_steps * 5 / 3)})
    return Advice("epochs", f"{where}{why}", {"train.num_train_epochs": settings.num_epochs + MORE_EPOCHS})


def _see_the_rows(settings: Settings, *, notes: tuple[str, ...]) -> Advice:
    """Train for one epoch before anything else is changed."""
    assert settings.seen_epochs is not None
    reason = f"only {settings.seen_epochs:.2g} of an epoch was trained: rows that were never seen come first"
    if settings.max_steps > 0:
        return Advice(
            "epochs", reason, {"train.max_steps": math.ceil(settings.max_steps / settings.seen_epochs)}, notes
        )
    return Advice("epochs", reason, {"train.num_train_epochs": 1.0}, notes)


def _remember_the_task(settings: Settings, worse: str) -> Advice:
    changes: dict[str, Any] = {"loss.alpha": round(settings.alpha + ALPHA_STEP, 4)}
    reason = f"the task is forgotten: {worse}, while the distance to the teacher shrank; alpha goes up"
    if settings.mse_decides:
        changes |= {"loss.hidden": "normalised_mse", "loss.gamma": NORMALISED_GAMMA}
        reason += (
            f", and mse makes room for normalised_mse: it makes up {settings.hidden_share:.0%} of the loss, so that "
            "alpha alone would change little"
        )
    return Advice("alpha", reason, changes)


def _straddled(measured: Measured, target: float) -> float | None:
    """Return the nearest threshold that the 95% interval of the retention holds; None where it holds none."""
    if measured.stderr is None:
        return None
    done = HIGH if HIGH <= target <= MODEST else target
    distance, nearest = min((abs(measured.retention - threshold), threshold) for threshold in {min(LOW, done), done})
    return nearest if distance < INTERVAL * measured.stderr else None


def _more_samples(settings: Settings, measured: Measured, threshold: float, target: float) -> Advice:
    """Ask as many questions as would tell the value from the threshold, or all where that is very many."""
    assert measured.stderr is not None
    distance = abs(measured.retention - threshold)
    times = math.inf if distance == 0 else (INTERVAL * measured.stderr / distance) ** 2
    limit = None if times > _FEW_TIMES else math.ceil(measured.num_samples * times / 100) * 100
    by_value = _by_value(settings, measured.retention, target)
    changes = " ".join(as_override(key, value) for key, value in by_value.changes.items())
    reason = f"{_unclear(measured, threshold)}, which decides the next step: ask more questions"
    note = f"by the value alone it would be {changes or 'nothing more'}: {by_value.reason}"
    return Advice("samples", reason, {"evaluate.limit": limit}, (note,))


def _unclear(measured: Measured, threshold: float) -> str:
    return f"retention {measured.retention:.1%} ± {measured.stderr:.1%} may be above or below {threshold:.1%}"
