"""The command `coldstill train`: stage two."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from coldstill.pipeline.commands.shared import (
    JsonOption,
    OverridesArgument,
    RecipeArgument,
    libraries_print_to_stderr,
    load_one_recipe,
    print_json,
    print_lines,
    speaks,
)
from coldstill.pipeline.runtime.endings import one_line_errors

if TYPE_CHECKING:  # a command's help does not wait for torch
    from coldstill.pipeline.train import TrainSummary


def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew; remove this output's earlier run.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train the student from the store, or go on where it was interrupted."""
    with one_line_errors():
        loaded = load_one_recipe(recipe, overrides, command="train")
        with libraries_print_to_stderr():
            from coldstill.pipeline.train import train

            result = train(loaded, restart=restart)
        if not speaks():
            return
        if as_json:
            print_json(result)
        else:
            print_lines(_lines(result))


def _lines(result: "TrainSummary") -> Iterator[str]:
    """Say what was trained now, and where the student is."""
    if not result.trained_steps:
        yield f"complete already, {result.num_steps} steps: {result.student}; to begin anew: --restart"
        return
    terms = ", ".join(f"{name.removeprefix('loss_')} {value:.4f}" for name, value in result.losses.items())
    yield f"trained    {result.trained_steps} of {result.num_steps} steps, {result.tokens_per_s:,.0f} tokens/s"
    if terms:
        yield f"last       {terms}"
    if result.kept is not None:
        yield f"kept       {result.kept}"
    yield f"memory     {result.peak_memory_bytes / 1e9:,.2f} GB at most"
    of_step = "" if result.exported_step == result.num_steps else f", of step {result.exported_step}, the best"
    yield f"student    {result.student}{of_step}"
