"""The `coldstill` command: parse, load the recipe, call one function, print its summary.

Torch and transformers are imported by the commands that need them, so that `--help` answers at once. What libraries
print while a stage runs goes to standard error; standard output is the summary's alone.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cache.errors import ColdstillError, RecipeError, StoreError
from pipeline.endings import DAMAGED, one_line_errors

app = typer.Typer(
    name="coldstill",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

cache_app = typer.Typer(name="cache", no_args_is_help=True, help="List, check, repair and remove stores.")
app.add_typer(cache_app)

RecipesArgument = Annotated[
    list[str],
    typer.Argument(metavar="RECIPE|KEY=VALUE", help="Recipes, and changes to all of them.", show_default=False),
]
RootArgument = Annotated[str, typer.Argument(help="What recipes name as `cache`: a folder or a URL.")]
StoreOption = Annotated[
    str | None,
    typer.Option("--store", help="Its name, or the beginning of it, where there are several.", show_default=False),
]
RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to it, such as loss.temperature=3.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")]


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
        _quieten_libraries()
        from pipeline import summaries
        from pipeline.demo import run_demo

        with contextlib.redirect_stdout(sys.stderr):
            result = run_demo(folder, say=print)
        if as_json:
            _print_json(result)
            return
        summaries.print_evaluation(result.evaluation)
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
        result = _run_stage("prune", recipe, overrides)
        if as_json:
            _print_json(result)
        elif result.was_made:
            print(f"pruned to blocks {result.kept_blocks}: {result.folder}")
        else:
            print(f"the student is there already: {result.folder}")


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
        from pipeline import summaries
        from pipeline.workers import parse_share

        recipes = _load_recipes(arguments)
        if dry_run:
            planned = _call("dry_run", *recipes)
            if as_json:
                _print_json(planned)
                return
            summaries.console().print(summaries.dry_run_table(planned))
            _print_lines(summaries.dry_run_lines(planned))
            return
        result = _call("precompute", *recipes, share=parse_share(worker) if worker else None)
        if not _speaks():
            return
        if as_json:
            _print_json(result)
        else:
            _print_lines(summaries.precompute_lines(result))


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew; remove this output's earlier run.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train the student from the store, or go on where it was interrupted."""
    with one_line_errors():
        result = _run_stage("train", recipe, overrides, restart=restart)
        if not _speaks():
            return
        if as_json:
            _print_json(result)
        elif result.trained_steps:
            terms = ", ".join(f"{name.removeprefix('loss_')} {value:.4f}" for name, value in result.losses.items())
            print(f"trained    {result.trained_steps} of {result.num_steps} steps, {result.tokens_per_s:,.0f} tokens/s")
            print(f"last       {terms}")
            print(f"student    {result.student}")
        else:
            print(f"complete already, {result.num_steps} steps: {result.student}; to begin anew: --restart")


@app.command()
def evaluate(recipe: RecipeArgument, overrides: OverridesArgument = None, as_json: JsonOption = False) -> None:
    """Judge teacher, pruned and recovered student on the eval rows."""
    with one_line_errors():
        result = _run_stage("evaluate", recipe, overrides)
        if as_json:
            _print_json(result)
        else:
            from pipeline import summaries

            summaries.print_evaluation(result)


@cache_app.command("ls")
def list_stores(root: RootArgument = "caches", as_json: JsonOption = False) -> None:
    """List the stores of a root."""
    with one_line_errors():
        from cache.inventory import describe_store, list_stores
        from pipeline import summaries

        stores, damaged = [], []
        for name in list_stores(root):
            try:
                stores.append(describe_store(root, name))
            except StoreError as error:
                damaged.append(str(error))
        if as_json:
            _print_json({"stores": stores, "damaged": damaged})
        else:
            summaries.console().print(summaries.store_table(stores))
        for message in damaged:
            typer.echo(f"coldstill: {message}", err=True)
        if damaged:
            raise typer.Exit(DAMAGED)


@cache_app.command("info")
def show_store(root: RootArgument = "caches", store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show columns, share complete, size, age, teacher and selections of a store, or of all in a root."""
    with one_line_errors():
        from cache.inventory import choose_stores, describe_store
        from pipeline import summaries

        described = [describe_store(root, name) for name in choose_stores(root, store)]
        if as_json:
            _print_json(described)
            return
        for summary in described:
            _print_lines(summaries.store_lines(summary))
            summaries.console().print(summaries.column_table(summary))
            summaries.console().print(summaries.selection_table(summary))


@cache_app.command("verify")
def verify_root(root: RootArgument = "caches", as_json: JsonOption = False) -> None:
    """Read every byte of a root and hold it against its checksum; exit code 1 where anything is wrong."""
    with one_line_errors():
        from cache.root_audit import verify
        from pipeline import summaries

        audit = verify(root)
        if as_json:
            _print_json({**dataclasses.asdict(audit), "is_clean": audit.is_clean})
        else:
            _print_lines(summaries.verify_lines(audit))
        if not audit.is_clean:
            raise typer.Exit(DAMAGED)


@cache_app.command("repair")
def repair_store(recipe: RecipeArgument, overrides: OverridesArgument = None, as_json: JsonOption = False) -> None:
    """Drop exactly what is damaged in the store of a recipe's teacher, and compute it again."""
    with one_line_errors():
        from pipeline import summaries

        result = _run_stage("repair", recipe, overrides)
        if as_json:
            _print_json(result)
        else:
            _print_lines(summaries.repair_lines(result))


@cache_app.command("rm")
def remove(
    root: RootArgument = "caches",
    store: StoreOption = None,
    column: Annotated[str | None, typer.Option(help="Remove only this column.", show_default=False)] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a store, or one column of it."""
    with one_line_errors():
        from cache.inventory import choose_stores, describe_store, remove_column, remove_store
        from cache.store import open_store, store_path
        from pipeline import summaries

        (name,) = choose_stores(root, store, just_one=True)
        path = store_path(root, name)
        what = f"column {column} of {path}" if column else path
        if not column:
            # What cannot be opened can still be removed.
            with contextlib.suppress(ColdstillError):
                what = f"{path}: {summaries.what_is_lost(describe_store(root, name))}"
        if not yes:
            typer.confirm(f"remove {what}?", abort=True, err=True)
        if column:
            remove_column(open_store(path), column)
        else:
            remove_store(root, name)
        print(f"removed {what}")


def main() -> None:
    """Run the command line."""
    app()


def _run_stage(name: str, recipe: Path, overrides: list[str] | None, **options: Any) -> Any:
    """Load the recipe and call the stage's function."""
    _quieten_libraries()
    from pipeline.recipe_file import load_recipe

    return _call(name, load_recipe(recipe, overrides or []), **options)


def _call(name: str, *arguments: Any, **options: Any) -> Any:
    """Call a stage; what libraries print meanwhile goes to standard error."""
    stage = getattr(importlib.import_module(f"pipeline.{name}"), name)
    with contextlib.redirect_stdout(sys.stderr):
        return stage(*arguments, **options)


def _load_recipes(arguments: list[str]) -> list[Any]:
    """Load recipes, each with all the overrides: an argument with `=` that is no file is an override."""
    _quieten_libraries()
    from pipeline.recipe_file import load_recipe

    overrides = [argument for argument in arguments if "=" in argument and not Path(argument).exists()]
    files = [argument for argument in arguments if argument not in overrides]
    if not files:
        raise RecipeError(f"no recipe among {' '.join(arguments)}; the first argument is a YAML file")
    return [load_recipe(Path(file), overrides) for file in files]


def _speaks() -> bool:
    """Whether this process prints: under torchrun or accelerate launch, the first one speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def _quieten_libraries() -> None:
    """Leave the screen to this program's own progress; warnings and errors still come through."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def _print_json(result: Any) -> None:
    print(json.dumps(result, indent=1, default=_json_default))


def _json_default(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return sorted(value) if isinstance(value, set) else str(value)


if __name__ == "__main__":
    main()
