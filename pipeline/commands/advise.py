"""The command `coldstill advise`: what to try next."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from coldstill.pipeline.commands.shared import (
    JsonOption,
    OverridesArgument,
    RecipeArgument,
    libraries_print_to_stderr,
    load_one_recipe,
    one_file,
    print_json,
    print_lines,
)
from coldstill.pipeline.runtime.endings import one_line_errors

if TYPE_CHECKING:  # a command's help does not wait for torch
    from coldstill.pipeline.advise import NextStep


def advise(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    target: Annotated[float, typer.Option("--target", help="The retention that is wanted.")] = 0.95,
    as_json: JsonOption = False,
) -> None:
    """Read the recipe's student and results, and say what to try next, and why. Loads no model."""
    with one_line_errors():
        file, changes = one_file(recipe, overrides)
        loaded = load_one_recipe(recipe, overrides, command="advise")
        with libraries_print_to_stderr():
            from coldstill.pipeline.advise import advise

            result = advise(loaded, arguments=[str(file), *changes], target=target)
        if as_json:
            print_json(result)
        else:
            print_lines(_lines(result, target))


def _lines(result: "NextStep", target: float) -> Iterator[str]:
    """Say what was read, what is retained, and the next step with its reason and its commands."""
    for name, what in result.read.items():
        yield f"{name:<11}{what}"
    kept = result.retention
    if kept is not None:
        error = "" if kept.stderr is None else f" ± {kept.stderr:.1%}"
        measure = "of the teacher on tasks" if kept.measure == "tasks" else "agreement with the teacher, a stand-in"
        yield f"retention  {kept.value:.1%}{error}, {measure}; wanted {target:.1%}"
    yield f"next       {result.reason}"
    for note in result.notes:
        yield f"note       {note}"
    for number, command in enumerate(result.commands):
        yield f"{'' if number else 'run':<11}{command}"
