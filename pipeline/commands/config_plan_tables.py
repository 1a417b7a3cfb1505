"""A plan by a config alone as the tables and lines that a person reads. Nothing is decided here."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from coldstill.pipeline.commands.shared import console
from coldstill.pipeline.runtime.units import format_amount, format_size

if TYPE_CHECKING:
    from coldstill.pipeline.estimates.by_config import ConfigPlan
    from coldstill.pipeline.estimates.machine_costs import PlacementCost


def print_config_plan(result: "ConfigPlan") -> None:
    """Show what stage one would cost on a machine, for both placements, and what it would write."""
    screen = console()
    for line in _lines(result):
        screen.print(line, highlight=False, soft_wrap=True)
    screen.print()
    screen.print(_placements_table(result))
    screen.print("workers divide the hours; each reads the weights for itself", highlight=False)
    screen.print()
    screen.print(_columns_table(result))


def _lines(result: "ConfigPlan") -> Iterator[str]:
    machine, tokens = result.machine, result.num_tokens
    yield (
        f"teacher    {result.architecture}, {result.num_parameters:,} parameters, {result.num_blocks} blocks, "
        f"{result.dtype}; by its config"
    )
    yield (
        f"machine    {format_amount(machine.flops, 'FLOP/s')}, {format_size(machine.memory_bytes)} beside "
        f"{format_size(machine.host_bytes)} of the host, weights at {format_size(machine.disk_rate)}/s"
    )
    for split, count in tokens.items():
        if count:
            yield f"{split:10} {count:,} tokens at {format_amount(result.flops_per_token[split], 'FLOP')} each"
    yield (
        f"store      about {format_size(result.about_bytes)}, at most {format_size(result.most_bytes)}; "
        f"{result.write_hours:,.1f} h of writing beside the teacher's work"
    )


def _placements_table(result: "ConfigPlan") -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("on one GPU")
    for cost in result.placements:
        table.add_column(cost.placement, justify="right")
    for name, of in (
        ("weights at once", lambda cost: format_size(cost.weight_bytes)),
        ("work on them", lambda cost: format_size(cost.work_bytes)),
        ("super-batch", _super_batch),
        ("between two blocks", _waiting),
        ("memory of the GPU", lambda cost: format_size(cost.device_bytes)),
        ("fits", lambda cost: "yes" if cost.fits else "no"),
        ("weights read", lambda cost: format_size(cost.read_bytes)),
        ("hours", lambda cost: f"{cost.hours:,.1f}"),
    ):
        table.add_row(name, *map(of, result.placements))
    return table


def _super_batch(cost: "PlacementCost") -> str:
    return "-" if cost.super_batch_tokens is None else f"{cost.super_batch_tokens:,} tokens"


def _waiting(cost: "PlacementCost") -> str:
    if cost.super_batch_tokens is None:
        return "-"
    return f"{format_size(cost.waiting_bytes)} on the {'host' if cost.is_waiting_on_host else 'GPU'}"


def _columns_table(result: "ConfigPlan") -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("column", "tokens", "bytes a token", "about", "at most"):
        table.add_column(heading, justify="left" if heading == "column" else "right")
    for column in result.columns:
        table.add_row(
            column.name,
            f"{column.num_tokens:,}",
            f"{column.about_bytes / max(column.num_tokens, 1):,.1f}",
            format_size(column.about_bytes),
            format_size(column.most_bytes),
        )
    once = format_size(result.constant_bytes)
    table.add_row("once: output head, calibrations", "", "", once, once)
    return table
