"""The command `coldstill plan`: what a recipe would cost and buy."""

from typing import Annotated

import typer

from coldstill.pipeline.commands.plan_tables import print_plan
from coldstill.pipeline.commands.shared import (
    JsonOption,
    OverridesArgument,
    RecipeArgument,
    libraries_print_to_stderr,
    load_one_recipe,
    print_json,
)
from coldstill.pipeline.runtime.endings import one_line_errors
from coldstill.pipeline.runtime.errors import RecipeError


def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", metavar="SIZE", help="Propose targets that fit it, such as 50GB.", show_default=False),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Train rows to measure on.")] = 16,
    as_json: JsonOption = False,
) -> None:
    """Measure what the recipe would cost and buy, on a few rows, before anything is spent.

    Bytes, room on the disk, hours of stage one, memory of stage two, and how faithful each kind of logits target is.
    """
    with one_line_errors():
        budget_bytes = None if budget is None else _budget_bytes(budget)
        loaded = load_one_recipe(recipe, overrides, command="plan")
        with libraries_print_to_stderr():
            from coldstill.pipeline.plan import plan

            result = plan(loaded, budget_bytes=budget_bytes, num_rows=rows)
        if as_json:
            print_json(result)
        else:
            print_plan(result)


def _budget_bytes(budget: str) -> int:
    from coldstill.pipeline.estimates.budget import parse_bytes

    try:
        return parse_bytes(budget)
    except ValueError as error:
        raise RecipeError(f"--budget {error}") from None
