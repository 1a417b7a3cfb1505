"""A plan as the tables and lines that a person reads. Nothing is decided here."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from coldstill.pipeline.commands.shared import console
from coldstill.pipeline.runtime.units import format_size

if TYPE_CHECKING:
    from coldstill.pipeline.plan import Plan


def print_plan(result: "Plan") -> None:
    """Show what a recipe costs, column by column, and what each kind of logits target buys."""
    screen = console()
    screen.print(_plan_table(result))
    for line in _plan_lines(result):
        screen.print(line, highlight=False, soft_wrap=True)
    screen.print()
    screen.print(_kinds_table(result))
    if result.budget_bytes is not None:
        screen.print()
        screen.print(_proposals_table(result, result.budget_bytes))


def _plan_table(result: "Plan") -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("column", "bytes a token", "to write"):
        table.add_column(heading, justify="left" if heading == "column" else "right")
    for column in result.columns:
        written = format_size(column.missing_bytes) if column.missing_bytes else "complete"
        table.add_row(column.name, f"{column.bytes_per_token:,.1f}", written)
    if result.constant_bytes:
        table.add_row("once: output head, calibrations", "", format_size(result.constant_bytes))
    return table


def _plan_lines(result: "Plan") -> Iterator[str]:
    free = "" if result.free_bytes is None else f"; {format_size(result.free_bytes)} free"
    yield f"to write   {format_size(result.missing_bytes)} in {result.store}{free}"
    yield f"teacher    {_teacher_memory(result)}"
    if result.missing_tokens:
        hours = f"{result.hours:,.1f} h" if result.hours >= 1 else f"{result.hours * 60:,.1f} min"
        yield f"stage one  {result.missing_tokens:,} tokens at {result.tokens_per_s:,.0f} tokens/s: {hours}"
    else:
        yield "stage one  nothing: all columns are complete"
    yield f"stage two  {format_size(result.train_memory_bytes)} of memory"


def _teacher_memory(result: "Plan") -> str:
    teacher = result.teacher
    size = format_size(teacher.weight_bytes)
    if teacher.super_batch_tokens is None:
        return f"{teacher.placement}, {size} of weights in memory"
    return (
        f"streamed, two of its {teacher.num_blocks} blocks at a time, {size} of weights in memory; up to "
        f"{teacher.super_batch_tokens:,} tokens pass a block together, as many as its reading takes to hide"
    )


def _kinds_table(result: "Plan") -> Table:
    table = Table(title=f"Logits targets at T = {result.temperature:g}", title_justify="left", box=None, pad_edge=False)
    for heading in ("setting", "bytes a token", "in all", "stored mass", "KL (nats)", "gradient cosine", "norm"):
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    for kind in result.kinds:
        fidelity = kind.fidelity
        table.add_row(
            kind.setting.replace("targets.logits.", "") + (" *" if kind.is_chosen else ""),
            f"{kind.bytes_per_token:,.1f}",
            format_size(kind.bytes_per_token * result.num_tokens),
            f"{fidelity.stored_mass:.2f}",
            "-" if fidelity.kl is None else f"{fidelity.kl:.4f}",
            f"{fidelity.grad_cosine:.4f}",
            f"{fidelity.grad_norm_ratio:.3f}",
        )
    table.caption = "* the recipe's own; gradients are held against live distillation's"
    table.caption_justify = "left"
    return table


def _proposals_table(result: "Plan", budget_bytes: int) -> Table:
    fits = result.proposals[0].total_bytes + result.constant_bytes <= budget_bytes
    title = f"What fits {format_size(budget_bytes)}, best first"
    if not fits:
        title = f"Nothing fits {format_size(budget_bytes)}; this is the smallest, take fewer rows"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("in all", "gradient cosine", "blocks", "hidden error", "overrides"):
        table.add_column(heading, justify="left" if heading == "overrides" else "right")
    for proposal in result.proposals:
        error = "-" if proposal.hidden_error is None else f"{proposal.hidden_error:.1e}"
        cells = (format_size(proposal.total_bytes), f"{proposal.grad_cosine:.4f}", str(proposal.num_blocks), error)
        table.add_row(*cells, proposal.overrides)
    return table
