"""The command `coldstill demo`: everything, small, from a text to a recovered student."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from coldstill.pipeline.commands.evaluation_tables import print_evaluation
from coldstill.pipeline.commands.shared import JsonOption, libraries_print_to_stderr, print_json, quieten_libraries
from coldstill.pipeline.runtime.endings import one_line_errors

if TYPE_CHECKING:  # a command's help does not wait for torch
    from coldstill.pipeline.demo import DemoResult


def demo(
    folder: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/demo"),
    as_json: JsonOption = False,
) -> None:
    """Recover a small pruned model from start to end: no network, two cores, a few minutes."""
    with one_line_errors():
        quieten_libraries()
        with libraries_print_to_stderr():
            from coldstill.pipeline.demo import run_demo

            result = run_demo(folder.expanduser(), say=print)
        if as_json:
            print_json(result)
        else:
            _print_result(result)


def _print_result(result: "DemoResult") -> None:
    """Print how good the student is, where everything lies, and what it took."""
    print_evaluation(result.evaluation)
    console = Console(soft_wrap=True)
    console.print(f"teacher    {result.teacher}")
    console.print(f"store      {result.store}")
    console.print(f"student    {result.student}")
    console.print(f"recipe     {result.recipe}")
    console.print(
        f"The teacher read {result.computed_tokens:,} tokens in this run; {result.seconds:.0f} s in all."
        if result.computed_tokens
        else f"Everything was complete already: no teacher was loaded; {result.seconds:.0f} s in all."
    )
