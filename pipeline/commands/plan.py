"""The command `coldstill plan`: what a recipe would cost and buy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from coldstill.pipeline.commands.config_plan_tables import print_config_plan
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
from coldstill.pipeline.runtime.units import parse_amount

_ROWS = 16
# What describes the machine of a plan without weights.
_MACHINE = {
    "--flops": "flops",
    "--memory": "memory_bytes",
    "--host-memory": "host_bytes",
    "--disk-rate": "disk_rate",
}


def _option(name: str, metavar: str, text: str) -> Any:
    return typer.Option(name, metavar=metavar, help=f"Without weights: {text}", show_default=False)


def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", metavar="SIZE", help="Propose targets that fit it, such as 50GB.", show_default=False),
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, help="Train rows to measure on; 16 by default.", show_default=False)
    ] = None,
    without_weights: Annotated[
        bool, typer.Option("--without-weights", help="By the teacher's config alone, for a machine that you describe.")
    ] = False,
    tokens: Annotated[
        str | None, _option("--tokens", "NUMBER", "tokens of train rows, such as 1e9; by default by max_rows.")
    ] = None,
    flops: Annotated[
        str | None, _option("--flops", "RATE", "what the GPU reaches a second, such as 400T, which is the default.")
    ] = None,
    memory: Annotated[str | None, _option("--memory", "SIZE", "of the GPU; 80GB by default.")] = None,
    host_memory: Annotated[str | None, _option("--host-memory", "SIZE", "of its host; 256GB by default.")] = None,
    disk_rate: Annotated[
        str | None, _option("--disk-rate", "RATE", "bytes of weights read a second; 2GB by default.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what the recipe would cost and buy, on a few rows, before anything is spent.

    Bytes, room on the disk, hours of stage one, memory of stage two, and how faithful each kind of logits target is.
    """
    with one_line_errors():
        described = {
            "--tokens": tokens,
            "--flops": flops,
            "--memory": memory,
            "--host-memory": host_memory,
            "--disk-rate": disk_rate,
        }
        if without_weights:
            _refuse({"--budget": budget, "--rows": rows}, "measures on rows, and --without-weights reads none")
            _plan_by_config(recipe, overrides, described, as_json=as_json)
            return
        _refuse(described, "describes a machine to --without-weights; a plan with weights measures on this one")
        budget_bytes = None if budget is None else _budget_bytes(budget)
        loaded = load_one_recipe(recipe, overrides, command="plan")
        with libraries_print_to_stderr():
            from coldstill.pipeline.plan import plan

            result = plan(loaded, budget_bytes=budget_bytes, num_rows=rows or _ROWS)
        if as_json:
            print_json(result)
        else:
            print_plan(result)


def _plan_by_config(
    recipe: Path, overrides: list[str] | None, described: Mapping[str, str | None], *, as_json: bool
) -> None:
    amounts = {name: _amount(name, text) for name, text in described.items() if text is not None}
    # By a name of its own: nothing is said of this machine, which is another one.
    loaded = load_one_recipe(recipe, overrides, command="plan --without-weights")
    with libraries_print_to_stderr():
        from coldstill.pipeline.estimates.by_config import plan_by_config
        from coldstill.pipeline.estimates.machine_costs import Machine

        tokens = amounts.pop("--tokens", None)
        machine = Machine(**{_MACHINE[name]: value for name, value in amounts.items()})
        result = plan_by_config(loaded, machine, num_tokens=None if tokens is None else round(tokens))
    if as_json:
        print_json(result)
    else:
        print_config_plan(result)


def _refuse(given: Mapping[str, object], why: str) -> None:
    for name, value in given.items():
        if value is not None:
            raise RecipeError(f"{name} {why}: leave one of them out")


def _amount(name: str, text: str) -> float:
    unit = {"--tokens": "", "--flops": "FLOP"}.get(name, "B")
    try:
        return parse_amount(text.strip().removesuffix("/s").removesuffix("S" if unit == "FLOP" else ""), unit=unit)
    except ValueError as error:
        raise RecipeError(f"{name} {error}") from None


def _budget_bytes(budget: str) -> int:
    from coldstill.pipeline.estimates.budget import parse_bytes

    try:
        return parse_bytes(budget)
    except ValueError as error:
        raise RecipeError(f"--budget {error}") from None
