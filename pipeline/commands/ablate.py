"""The command `coldstill ablate`: a sweep, and its tables."""

from pathlib import Path
from typing import Annotated

import typer

from coldstill.pipeline.commands.shared import (
    JsonOption,
    OverridesArgument,
    console,
    libraries_print_to_stderr,
    one_file,
    print_json,
    print_lines,
    quieten_libraries,
)
from coldstill.pipeline.runtime.endings import UNFINISHED, one_line_errors

SweepArgument = Annotated[Path, typer.Argument(metavar="SWEEP", help="The sweep, a YAML file.", show_default=False)]


def ablate(
    sweep: SweepArgument,
    overrides: OverridesArgument = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run again what failed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare variants of a recipe over several seeds: what is complete is not run again, the teacher runs once.

    Exit code 1 where runs failed.
    """
    with one_line_errors():
        quieten_libraries()
        file, changes = one_file(sweep, overrides, what="sweep")
        with libraries_print_to_stderr():
            from coldstill.pipeline.ablate import ablate
            from coldstill.pipeline.commands.sweep_tables import sweep_lines, sweep_tables

            result = ablate(file, changes, retry=retry, say=_say)
        if as_json:
            print_json(result)
        else:
            for table in sweep_tables(result):
                console().print(table)
            print_lines(sweep_lines(result))
        if any(run.status == "failed" for variant in result.variants for run in variant.runs):
            raise typer.Exit(UNFINISHED)


def _say(line: str) -> None:
    typer.echo(f"coldstill: {line}", err=True)
