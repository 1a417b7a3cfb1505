"""The sections of a run's report that follow its training: the terms of the loss, and what eval rows said meanwhile."""

import math
from collections.abc import Callable, Sequence

from coldstill.pipeline.figures.curves import Points, curve_figure
from coldstill.pipeline.figures.sheet import Figure
from coldstill.pipeline.losses.objective import Objective
from coldstill.pipeline.outputs.kept import Kept
from coldstill.pipeline.pages.data import RunRecord
from coldstill.pipeline.pages.numbers import is_number
from coldstill.pipeline.pages.page import Block, Figures, Missing, Section, Words
from coldstill.pipeline.recipe.loss import LossConfig

# Where the highest of curve and levels is this many times the lowest, only a logarithmic axis shows both.
_WIDE = 12.0


def loss_section(run: RunRecord) -> Section:
    """Draw the terms of the loss over the steps."""
    figures = loss_figures(run.log, run.recipe.loss, prefix="")
    title = "Loss over steps"
    if not figures:
        return Section("loss", title, [Missing("Nothing was logged; train with train.logging_steps below the steps")])
    return Section("loss", title, [Figures(figures)])


def loss_figures(log: Sequence[dict[str, float]], loss: LossConfig, *, prefix: str) -> list[Figure]:
    """Draw each term that was logged; the figures' names begin with the prefix."""
    step = "optimizer step"
    objective = Objective.of(loss)
    names = {"weighted sum": "loss", **{term.label: term.name for term in objective.over_vocabulary}}
    series = {label: points for label, name in names.items() if (points := logged(log, name))}
    figures = []
    if series:
        caption = (
            "Training loss, lower is better: each point is the mean since the last log; "
            "terms are drawn before their weights."
        )
        figures.append(
            curve_figure(
                f"{prefix}loss-terms",
                "Loss and its terms over vocabulary",
                series,
                x_label=step,
                y_label="loss (nats a token)",
                caption=caption,
            )
        )
    for term in objective.over_blocks:
        points = [(x, y) for x, y in logged(log, term.name) if y > 0]
        if points:
            caption = f"How far the student's {term.compared} are from the teacher's, averaged over mapped pairs."
            figures.append(
                curve_figure(
                    prefix + term.name.replace("_", "-"),
                    term.title,
                    {term.label: points},
                    x_label=step,
                    y_label=f"{term.unit} (log axis)",
                    caption=caption,
                    is_log=True,
                )
            )
    return figures


def epochs_section(run: RunRecord) -> Section:
    """Draw what the eval rows said while the student was trained."""
    title = "Recovery over epochs"
    losses = logged(run.log, "eval_loss_task", by="epoch")
    divergences = logged(run.log, "eval_loss_logits", by="epoch")
    if not losses and not divergences:
        how = "Nothing was judged while training; to see it: train.eval_strategy=epoch, and coldstill train --restart"
        return Section("epochs", title, [Missing(how)])
    figures = []
    if losses:
        models = (run.evaluation or {}).get("models", {})
        levels = {name: models[name]["perplexity"] for name in ("teacher", "pruned") if name in models}
        levels = {name: value for name, value in levels.items() if is_number(value)}
        points = [(epoch, math.exp(min(loss, 700.0))) for epoch, loss in losses]
        by_domain = _of_domains(run, "loss_task", lambda loss: math.exp(min(loss, 700.0)))
        drawn = [*levels.values(), *(value for series in (points, *by_domain.values()) for _, value in series)]
        is_log = max(drawn) > _WIDE * min(drawn)
        figures.append(
            curve_figure(
                "perplexity-over-epochs",
                "Perplexity on the eval rows",
                {"student": points, **by_domain},
                x_label="epoch",
                y_label="perplexity (exp of nats a token" + (", log axis)" if is_log else ")"),
                caption="Lower is better; the lines across are the teacher and the pruned student, judged alike.",
                is_log=is_log,
                levels=levels,
            )
        )
    if divergences:
        loss = run.recipe.loss
        figures.append(
            curve_figure(
                "divergence-over-epochs",
                "Divergence from the teacher on the eval rows",
                {"student": divergences, **_of_domains(run, "loss_logits")},
                x_label="epoch",
                y_label=f"T² · {loss.divergence}, T = {loss.temperature:g} (nats a token)",
                caption="Lower is nearer to the teacher's distribution, which itself is at 0.",
            )
        )
    blocks: list[Block] = [Figures(figures)]
    if kept := run.summary.get("kept"):
        blocks.append(Words(f"Kept: {Kept(**kept)}."))
    return Section("epochs", title, blocks)


def _of_domains(run: RunRecord, name: str, change: Callable[[float], float] = float) -> dict[str, Points]:
    """Return what was logged of each source of eval rows, where there are several."""
    found = {label: logged(run.log, f"eval_{label}_{name}", by="epoch") for label in run.recipe.data.eval_labels}
    return {label: [(epoch, change(value)) for epoch, value in points] for label, points in found.items()}


def logged(log: Sequence[dict[str, float]], name: str, *, by: str = "step") -> Points:
    """Return the logged values of a name, each with its step or epoch."""
    return [(entry[by], entry[name]) for entry in log if name in entry]
