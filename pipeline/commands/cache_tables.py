"""Stores, audits and repairs as the lines and tables that a person reads. Nothing is decided here."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from coldstill.pipeline.commands.precompute import precompute_lines
from coldstill.pipeline.commands.shared import counted
from coldstill.pipeline.runtime.units import format_size

if TYPE_CHECKING:  # a listing does not wait for torch
    from coldstill.cache.inventory import StoreSummary
    from coldstill.cache.root_audit import RootAudit
    from coldstill.pipeline.repair import RepairSummary
    from coldstill.pipeline.stage_one.live_check import LiveCheck

_SHOWN_PROBLEMS = 50


def store_table(stores: "list[StoreSummary]") -> Table:
    """Show the stores of a root."""
    table = Table(box=None, pad_edge=False)
    for heading in ("store", "teacher", "rows", "tokens", "shards", "size", "bytes a token", "written"):
        is_word = heading in ("store", "teacher", "written")
        table.add_column(heading, justify="left" if is_word else "right", no_wrap=True)
    for store in stores:
        per_token = f"{store.num_bytes / store.num_tokens:,.0f}" if store.num_tokens else "-"
        table.add_row(
            store.name,
            str(store.teacher.get("name", "?")),
            f"{store.num_rows:,}",
            f"{store.num_tokens:,}",
            f"{store.num_shards:,}",
            format_size(store.num_bytes),
            per_token,
            _age(store.age_s) + (f", in use by {', '.join(store.writers)}" if store.writers else ""),
        )
    return table


def store_lines(store: "StoreSummary") -> Iterator[str]:
    """Say which store it is."""
    identity = store.teacher["identity"]
    yield f"store      {store.path}"
    architecture = store.teacher.get("architecture", "?")
    yield f"teacher    {store.teacher.get('name', '?')}, {architecture} in {identity['dtype']}"
    yield f"identity   weights {identity['weights'][:12]}, config {identity['config'][:12]}"
    yield f"rows       {store.num_rows:,}; {store.num_tokens:,} tokens in {counted(store.num_shards, 'shard')}"
    yield f"size       {format_size(store.num_bytes)}, written {_age(store.age_s)}"
    for writer in store.writers:
        yield f"in use by  {writer}"


def what_is_lost(store: "StoreSummary") -> str:
    """Say what goes with a store."""
    return f"{store.num_tokens:,} tokens of {store.teacher.get('name', '?')}, {format_size(store.num_bytes)}"


def column_table(store: "StoreSummary") -> Table:
    """Show the columns of a store."""
    table = Table(box=None, pad_edge=False)
    for heading in ("column", "shards", "complete", "bytes a token", "size"):
        table.add_column(heading, justify="left" if heading == "column" else "right")
    for column in store.columns:
        per_token = "-" if column.bytes_per_token is None else f"{column.bytes_per_token:,.1f}"
        share = f"{column.share:.1%}" if column.share < 1 else "all"
        table.add_row(column.name, f"{column.num_shards:,}", share, per_token, format_size(column.num_bytes))
    return table


def selection_table(store: "StoreSummary") -> Table:
    """Show the selections of a store."""
    table = Table(box=None, pad_edge=False)
    for heading in ("selection", "rows", "tokens", "source"):
        table.add_column(heading, justify="left" if heading in ("selection", "source") else "right")
    for selection in store.selections:
        sources = selection.source.get("sources", [selection.source])
        named = "; ".join(
            ", ".join(str(one[key]) for key in ("path", "name", "split") if one.get(key)) for one in sources
        )
        table.add_row(selection.name, f"{selection.num_rows:,}", f"{selection.num_tokens:,}", named)
    return table


def verify_lines(audit: "RootAudit") -> Iterator[str]:
    """Say what an audit found, the worst last."""
    for store in audit.stores:
        verdict = "all as written" if not store.problems else counted(len(store.problems), "problem")
        holds = f"{counted(store.num_columns, 'column')} of shards, {format_size(store.num_bytes)}"
        yield f"{store.path}: {holds}: {verdict}"
        if store.unfinished or store.unlisted:
            files = len(store.unfinished) + len(store.unlisted)
            yield f"  {counted(files, 'unfinished write')} of a run that was cut off; precompute goes on from there"
    problems = [(store.path, problem) for store in audit.stores for problem in store.problems]
    problems += [(audit.root, problem) for problem in audit.problems]
    for where, problem in problems[:_SHOWN_PROBLEMS]:
        yield f"  {where}/{problem.file}: {problem.what}"
    if len(problems) > _SHOWN_PROBLEMS:
        yield f"  and {len(problems) - _SHOWN_PROBLEMS:,} more; --json lists all"
    if problems:
        yield f"{counted(len(problems), 'problem')}; run: coldstill cache repair RECIPE"


def live_table(check: "LiveCheck") -> Table:
    """Show each column's error beside the teacher's noise: the mean, and the largest behind it."""
    table = Table(box=None, pad_edge=False)
    for heading in ("column", "measure", "mean", "largest", "noise", "stated", "verdict"):
        is_number = heading in ("mean", "largest", "noise")
        table.add_column(heading, justify="right" if is_number else "left", no_wrap=heading != "stated")
    for column in check.columns:
        table.add_row(
            column.column,
            column.measure,
            *(f"{value:.2g}" for value in (column.mean, column.largest, column.noise_largest)),
            column.stated.removeprefix("at most ").removesuffix(", and float32 rounding"),
            "within" if column.is_within else "beyond",
        )
    return table


def live_lines(check: "LiveCheck") -> Iterator[str]:
    """Say what a live check found."""
    rows = f"{counted(check.num_rows, 'row')}, {check.num_tokens:,} tokens"
    beyond = [column for column in check.columns if not column.is_within]
    if check.unchecked:
        yield f"no row of these has {', '.join(check.unchecked)}; take more rows to compare it"
    if not beyond:
        yield f"{rows}, run twice: every column is within what it states and ten times the noise"
    for column in beyond:
        yield f"{column.column} is beyond what it states and ten times the noise, most at {column.worst}"


def repair_lines(result: "RepairSummary") -> Iterator[str]:
    """Say what a repair did."""
    mended = result.mended
    yield f"store      {result.store}"
    for shard, column in mended.dropped:
        yield f"dropped    column {column}, shard {shard}"
    for name in result.removed:
        yield f"dropped    {name}"
    if mended.rewritten or mended.adopted or mended.removed:
        yield (
            f"mended     {counted(mended.rewritten, 'metadata file')} written again, "
            f"{counted(mended.adopted, 'column')} found again, {counted(mended.removed, 'stray file')} removed"
        )
    yield from list(precompute_lines(result.precompute))[1:]


def _age(age_s: float | None) -> str:
    if age_s is None:
        return "?"
    for length_s, noun in ((86_400, "day"), (3600, "hour"), (60, "minute")):
        if age_s >= length_s:
            return f"{counted(int(age_s // length_s), noun)} ago"
    return "just now"
