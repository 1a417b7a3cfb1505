"""The `coldstill` command: parse, load the recipe, call one function, print its summary.

Torch and transformers are imported by the commands that need them, so that `--help` answers at once. What libraries
print while a stage runs goes to standard error; standard output is the summary's alone.
"""

import contextlib
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from coldstill.cache.errors import RecipeError
from coldstill.pipeline.commands.ablate import ablate
from coldstill.pipeline.commands.advise import advise
from coldstill.pipeline.commands.cache import cache_app
from coldstill.pipeline.commands.report import report
from coldstill.pipeline.commands.shared import (
    JsonOption,
    OverridesArgument,
    RecipeArgument,
    RecipesArgument,
    call,
    load_recipes,
    print_json,
    print_lines,
    quieten_libraries,
    run_stage,
    speaks,
)
from coldstill.pipeline.runtime.endings import one_line_errors
from rich.console import Console

app = typer.Typer(
    name="coldstill",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(cache_app)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"coldstill {version('coldstill')}")
        raise typer.Exit


@app.callback()
def coldstill(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Recover pruned language models from a teacher that runs once: precompute, train, evaluate."""


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/demo"),
    as_json: JsonOption = False,
) -> None:
    """Recover a small pruned model from start to end: no network, two cores, a few minutes."""
    with one_line_errors():
        quieten_libraries()
        from coldstill.pipeline.commands.evaluation_tables import print_evaluation
        from coldstill.pipeline.demo import run_demo

        with contextlib.redirect_stdout(sys.stderr):
            result = run_demo(folder.expanduser(), say=print)
        if as_json:
            print_json(result)
            return
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


@app.command()
def prune(recipe: RecipeArgument, overrides: OverridesArgument = None, as_json: JsonOption = False) -> None:
    """Make the recipe's student from its teacher."""
    with one_line_errors():
        result = run_stage("prune", recipe, overrides)
        if as_json:
            print_json(result)
        else:
            from coldstill.pipeline.commands.summaries import prune_lines

            print_lines(prune_lines(result))


@app.command()
def precompute(
    arguments: RecipesArgument,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is missing and what it costs; do nothing.")
    ] = False,
    worker: Annotated[
        str | None,
        typer.Option(
            "--worker", metavar="I/N", help="Compute the I-th of N shares: one process for each.", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run the teacher once: make the recipe's columns complete for its rows.

    Several recipes of one teacher are served by one pass.
    """
    with one_line_errors():
        from coldstill.pipeline.commands import summaries
        from coldstill.pipeline.stage_one.workers import parse_share

        recipes = load_recipes(arguments)
        if dry_run:
            planned = call("stage_one.dry_run", *recipes)
            if as_json:
                print_json(planned)
                return
            summaries.console().print(summaries.dry_run_table(planned))
            print_lines(summaries.dry_run_lines(planned))
            return
        result = call("precompute", *recipes, share=parse_share(worker) if worker else None)
        if not speaks():
            return
        if as_json:
            print_json(result)
        else:
            print_lines(summaries.precompute_lines(result))


@app.command()
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
        from coldstill.pipeline.estimates.budget import parse_bytes

        try:
            budget_bytes = None if budget is None else parse_bytes(budget)
        except ValueError as error:
            raise RecipeError(f"--budget {error}") from None
        result = run_stage("plan", recipe, overrides, budget_bytes=budget_bytes, num_rows=rows)
        if as_json:
            print_json(result)
        else:
            from coldstill.pipeline.commands.plan_tables import print_plan

            print_plan(result)


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew; remove this output's earlier run.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train the student from the store, or go on where it was interrupted."""
    with one_line_errors():
        result = run_stage("train", recipe, overrides, restart=restart)
        if not speaks():
            return
        if as_json:
            print_json(result)
        elif result.trained_steps:
            terms = ", ".join(f"{name.removeprefix('loss_')} {value:.4f}" for name, value in result.losses.items())
            print(f"trained    {result.trained_steps} of {result.num_steps} steps, {result.tokens_per_s:,.0f} tokens/s")
            if terms:
                print(f"last       {terms}")
            print(f"memory     {result.peak_memory_bytes / 1e9:,.2f} GB at most")
            of_step = "" if result.exported_step == result.num_steps else f", of step {result.exported_step}, the best"
            print(f"student    {result.student}{of_step}")
        else:
            print(f"complete already, {result.num_steps} steps: {result.student}; to begin anew: --restart")


@app.command()
def evaluate(recipe: RecipeArgument, overrides: OverridesArgument = None, as_json: JsonOption = False) -> None:
    """Judge teacher, pruned and recovered student on the eval rows, and on the recipe's tasks."""
    with one_line_errors():
        result = run_stage("evaluate", recipe, overrides)
        if as_json:
            print_json(result)
        else:
            from coldstill.pipeline.commands.evaluation_tables import print_evaluation

            print_evaluation(result)


app.command()(ablate)
app.command()(advise)
app.command()(report)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
