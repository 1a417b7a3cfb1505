"""The command `coldstill precompute`: the teacher's one run, or with `--dry-run` what it would do."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from coldstill.pipeline.commands.shared import (
    JsonOption,
    RecipesArgument,
    console,
    counted,
    libraries_print_to_stderr,
    load_recipes,
    print_json,
    print_lines,
    speaks,
)
from coldstill.pipeline.runtime.endings import one_line_errors
from coldstill.pipeline.runtime.units import format_size

if TYPE_CHECKING:  # a command's help does not wait for torch
    from coldstill.pipeline.precompute import PrecomputeSummary
    from coldstill.pipeline.recipe.sections import Recipe
    from coldstill.pipeline.stage_one.dry_run import DryRun


def precompute(
    arguments: RecipesArgument,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is missing and what it costs; do nothing.")
    ] = False,
    worker: Annotated[
        str | None,
        typer.Option(
            "--worker",
            metavar="I/N|auto[/N]",
            help="Compute the I-th of N shares; auto asks SLURM or Kubernetes.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run the teacher once: make the recipe's columns complete for its rows.

    Several recipes of one teacher are served by one pass.
    """
    with one_line_errors():
        recipes = load_recipes(arguments, command="precompute")
        if dry_run:
            _dry_run(recipes, as_json=as_json)
            return
        with libraries_print_to_stderr():
            from coldstill.pipeline.precompute import precompute
            from coldstill.pipeline.stage_one.workers import parse_share

            result = precompute(*recipes, share=parse_share(worker) if worker else None)
        if not speaks():
            return
        if as_json:
            print_json(result)
        else:
            print_lines(precompute_lines(result))


def _dry_run(recipes: "list[Recipe]", *, as_json: bool) -> None:
    with libraries_print_to_stderr():
        from coldstill.pipeline.stage_one.dry_run import dry_run

        planned = dry_run(*recipes)
    if as_json:
        print_json(planned)
        return
    console().print(_dry_run_table(planned))
    print_lines(_dry_run_lines(planned))


def precompute_lines(result: "PrecomputeSummary") -> Iterator[str]:
    """Say what a run of stage one did."""
    rows = ", ".join(f"{count} {split}" for split, count in sorted(result.num_rows.items(), reverse=True))
    yield f"store      {result.store}"
    for student in dict.fromkeys(result.students):
        yield f"student    {student}"
    yield f"rows       {rows}; {result.num_tokens:,} tokens in {counted(result.num_shards, 'shard')}"
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
        yield f"missing    {counted(result.missing_shards, 'shard')}: the shares of other workers are not all there yet"


def _dry_run_table(result: "DryRun") -> Table:
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


def _dry_run_lines(result: "DryRun") -> Iterator[str]:
    """Say what it costs in all."""
    yield f"{result.num_tokens:,} tokens in {counted(result.num_shards, 'shard')} of {result.store}"
    if result.undecided_blocks:
        yield (
            f"{counted(result.undecided_blocks, 'mapped block')}: which ones is known when the student's blocks are "
            "chosen; those that are stored already cost nothing"
        )
    if result.students_to_prune:
        yield f"{counted(result.students_to_prune, 'student')} to prune: the teacher is loaded"
    if result.computed_tokens:
        size = format_size(result.missing_bytes)
        yield f"the teacher would read {result.computed_tokens:,} tokens, and write at most {size}"
    elif not result.students_to_prune:
        yield "everything is complete: precompute would load no teacher"
