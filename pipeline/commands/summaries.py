"""Results as the lines and tables that a person reads. Nothing is decided here."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from coldstill.pipeline.runtime.units import format_size
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:  # a listing does not wait for torch
    from coldstill.cache.inventory import StoreSummary
    from coldstill.cache.root_audit import RootAudit
    from coldstill.pipeline.precompute import PrecomputeSummary
    from coldstill.pipeline.repair import RepairSummary
    from coldstill.pipeline.stage_one.dry_run import DryRun
    from coldstill.pipeline.stage_one.live_check import LiveCheck
    from coldstill.pipeline.students.preparing import PreparedStudent

_SHOWN_PROBLEMS = 50
_FILE_WIDTH = 160


def console() -> Console:
    """Give the screen, or for a file or a pipe one that is wide enough for every table."""
    screen = Console()
    return screen if screen.is_terminal else Console(width=_FILE_WIDTH)


def prune_lines(result: "PreparedStudent") -> Iterator[str]:
    """Say what was cut of the teacher, and what that cost."""
    yield f"student    {result.folder}" + ("" if result.was_made or result.report is None else " (there already)")
    report = result.report
    if report is None:
        yield "nothing was cut: the recipe's student is there already"
        return
    parameters, blocks, loss = report["parameters"], report["blocks"], report["judged"]["perplexity"]
    share = parameters["student"] / parameters["teacher"]
    yield f"parameters {parameters['student']:,} of {parameters['teacher']:,} ({share:.1%})"
    removed = "" if blocks["kept"] is None else _removed(blocks["kept"], blocks["teacher"])
    yield f"blocks     {blocks['student']} of {blocks['teacher']}{removed}"
    for name, what in (("mlp", "neurons a block"), ("hidden", "channels")):
        sizes = report[name]
        if sizes["student"] != sizes["teacher"]:
            yield f"{name:10} {sizes['student']:,} of {sizes['teacher']:,} {what}"
    if report["reconstructed"]:
        yield "fitted     what blocks write, to the teacher's residual stream (student.prune.reconstruct)"
    rows = "the calibration rows" if report["judged"]["are_calibration"] else "train rows behind the calibration rows"
    yield (
        f"perplexity {loss['student']:,.2f}, the teacher's {loss['teacher']:,.2f}, on "
        f"{report['judged']['num_tokens']:,} tokens of {rows}"
    )


def _removed(kept: list[int], num_blocks: int) -> str:
    gone = [str(block) for block in range(num_blocks) if block not in kept]
    return f", without {', '.join(gone)}" if gone else ""


def precompute_lines(result: "PrecomputeSummary") -> Iterator[str]:
    """Say what a run of stage one did."""
    rows = ", ".join(f"{count} {split}" for split, count in sorted(result.num_rows.items(), reverse=True))
    yield f"store      {result.store}"
    for student in dict.fromkeys(result.students):
        yield f"student    {student}"
    yield f"rows       {rows}; {result.num_tokens:,} tokens in {_count(result.num_shards, 'shard')}"
    if result.num_shared:
        yield f"left out   {result.num_shared:,} documents or rows of train, because eval has them"
    if result.computed_tokens:
        rate = result.computed_tokens / result.seconds
        per_token = result.written_bytes / result.computed_tokens
        yield (
            f"computed   {result.computed_tokens:,} tokens in {result.seconds:.0f} s ({rate:,.0f} tokens/s), "
            f"{format_size(result.written_bytes)}, {per_token:,.0f} bytes a token"
        )
    elif not result.missing_shards:
        loaded = "the teacher was loaded to make the student" if result.teacher_was_loaded else "no teacher was loaded"
        yield f"computed   nothing: all columns are complete, {loaded}"
    if result.missing_shards:
        yield f"missing    {_count(result.missing_shards, 'shard')}: the shares of other workers are not all there yet"


def dry_run_table(result: "DryRun") -> Table:
    """Show what stage one would do, column by column."""
    table = Table(box=None, pad_edge=False)
    for heading in ("column", "complete", "missing", "to write"):
        table.add_column(heading, justify="left" if heading == "column" else "right")
    for column in result.columns:
        missing = column.num_shards - column.num_complete
        about = (
            "" if not missing else f"{'about' if column.is_measured else 'at most'} {format_size(column.missing_bytes)}"
        )
        table.add_row(column.name, f"{column.num_complete} of {column.num_shards}", str(missing or "-"), about or "-")
    return table


def dry_run_lines(result: "DryRun") -> Iterator[str]:
    """Say what it costs in all."""
    yield f"{result.num_tokens:,} tokens in {_count(result.num_shards, 'shard')} of {result.store}"
    if result.undecided_blocks:
        yield (
            f"{_count(result.undecided_blocks, 'mapped block')}: which ones is known when the student was pruned by "
            "importance; those that are stored already cost nothing"
        )
    if result.students_to_prune:
        yield f"{_count(result.students_to_prune, 'student')} to prune: the teacher is loaded"
    if result.computed_tokens:
        size = format_size(result.missing_bytes)
        yield f"the teacher would read {result.computed_tokens:,} tokens, and write at most {size}"
    elif not result.students_to_prune:
        yield "everything is complete: precompute would load no teacher"


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
    yield f"rows       {store.num_rows:,}; {store.num_tokens:,} tokens in {_count(store.num_shards, 'shard')}"
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
        source = ", ".join(str(selection.source[key]) for key in ("path", "name", "split") if selection.source.get(key))
        table.add_row(selection.name, f"{selection.num_rows:,}", f"{selection.num_tokens:,}", source)
    return table


def verify_lines(audit: "RootAudit") -> Iterator[str]:
    """Say what an audit found, the worst last."""
    for store in audit.stores:
        verdict = "all as written" if not store.problems else _count(len(store.problems), "problem")
        holds = f"{_count(store.num_columns, 'column')} of shards, {format_size(store.num_bytes)}"
        yield f"{store.path}: {holds}: {verdict}"
        if store.unfinished or store.unlisted:
            files = len(store.unfinished) + len(store.unlisted)
            yield f"  {_count(files, 'unfinished write')} of a run that was cut off; precompute goes on from there"
    problems = [(store.path, problem) for store in audit.stores for problem in store.problems]
    problems += [(audit.root, problem) for problem in audit.problems]
    for where, problem in problems[:_SHOWN_PROBLEMS]:
        yield f"  {where}/{problem.file}: {problem.what}"
    if len(problems) > _SHOWN_PROBLEMS:
        yield f"  and {len(problems) - _SHOWN_PROBLEMS:,} more; --json lists all"
    if problems:
        yield f"{_count(len(problems), 'problem')}; run: coldstill cache repair RECIPE"


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
    rows = f"{_count(check.num_rows, 'row')}, {check.num_tokens:,} tokens"
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
            f"mended     {_count(mended.rewritten, 'metadata file')} written again, "
            f"{_count(mended.adopted, 'column')} found again, {_count(mended.removed, 'stray file')} removed"
        )
    yield from list(precompute_lines(result.precompute))[1:]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _age(age_s: float | None) -> str:
    if age_s is None:
        return "?"
    for length_s, noun in ((86_400, "day"), (3600, "hour"), (60, "minute")):
        if age_s >= length_s:
            return f"{_count(int(age_s // length_s), noun)} ago"
    return "just now"
