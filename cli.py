"""The `coldstill` command: parse, load the recipe, call one function, print its summary.

Torch and transformers are imported by the commands that need them, so that `--help` answers at once. What libraries
print while a stage runs goes to standard error; standard output is the summary's alone.
"""

import contextlib
import dataclasses
import errno
import importlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cache.errors import ColdstillError

if TYPE_CHECKING:
    from pipeline.evaluate import Evaluation

USER_ERROR = 2
INTERRUPTED = 130
TERMINATED = 143

# What the operating system says when the user's disk, and not this program, is at fault.
_DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOTDIR,
    errno.EEXIST,
}

app = typer.Typer(
    name="coldstill",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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
    with _one_line_errors():
        _quieten_libraries()
        from pipeline.demo import run_demo

        with contextlib.redirect_stdout(sys.stderr):
            result = run_demo(folder, say=print)
        if as_json:
            _print_json(result)
            return
        _print_evaluation(result.evaluation)
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
    with _one_line_errors():
        result = _run_stage("prune", recipe, overrides)
        if as_json:
            _print_json(result)
        elif result.was_made:
            print(f"pruned to blocks {result.kept_blocks}: {result.folder}")
        else:
            print(f"the student is there already: {result.folder}")


@app.command()
def precompute(recipe: RecipeArgument, overrides: OverridesArgument = None, as_json: JsonOption = False) -> None:
    """Run the teacher once: make the recipe's columns complete for its rows."""
    with _one_line_errors():
        result = _run_stage("precompute", recipe, overrides)
        if as_json:
            _print_json(result)
            return
        rows = ", ".join(f"{count} {split}" for split, count in sorted(result.num_rows.items(), reverse=True))
        print(f"store      {result.store}")
        print(f"student    {result.student}")
        print(f"rows       {rows}; {result.num_tokens:,} tokens in {result.num_shards} shards")
        if result.computed_tokens:
            rate = result.computed_tokens / result.seconds
            per_token = result.written_bytes / result.computed_tokens
            print(
                f"computed   {result.computed_tokens:,} tokens in {result.seconds:.0f} s ({rate:,.0f} tokens/s), "
                f"{result.written_bytes / 1e6:,.1f} MB, {per_token:,.0f} bytes a token"
            )
        else:
            loaded_note = (
                "the teacher was loaded to make the student" if result.teacher_was_loaded else "no teacher was loaded"
            )
            print(f"computed   nothing: all columns are complete, {loaded_note}")


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew; remove this output's earlier run.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train the student from the store, or go on where it was interrupted."""
    with _one_line_errors():
        result = _run_stage("train", recipe, overrides, restart=restart)
        if os.environ.get("RANK", "0") != "0":
            return  # under torchrun or accelerate launch, the first process speaks for all
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
    with _one_line_errors():
        result = _run_stage("evaluate", recipe, overrides)
        if as_json:
            _print_json(result)
        else:
            _print_evaluation(result)


def main() -> None:
    """Run the command line."""
    app()


def _run_stage(name: str, recipe: Path, overrides: list[str] | None, **options: Any) -> Any:
    """Load the recipe and call the stage's function; what libraries print meanwhile goes to standard error."""
    _quieten_libraries()
    from pipeline.recipe_file import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    stage = getattr(importlib.import_module(f"pipeline.{name}"), name)
    with contextlib.redirect_stdout(sys.stderr):
        return stage(loaded, **options)


def _quieten_libraries() -> None:
    """Leave the screen to this program's own progress; warnings and errors still come through."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn what is the user's to mend into one line and exit code 2, and an interruption into a word of comfort."""
    previous = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        yield
    except ColdstillError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        _fail(f"{error.filename or 'disk'}: {error.strerror}; what was committed stays; run the command again to go on")
    except _Terminated:
        _say_interrupted()
        raise typer.Exit(TERMINATED) from None
    except KeyboardInterrupt:
        _say_interrupted()
        raise typer.Exit(INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


class _Terminated(BaseException):
    """SIGTERM, as an exception, so that what is half-made is removed on the way out."""


def _raise_terminated(_signal: int, _frame: Any) -> None:
    raise _Terminated


def _say_interrupted() -> None:
    print("\ninterrupted; what was committed stays, run the same command again to go on", file=sys.stderr)


def _fail(message: str) -> None:
    print(f"coldstill: {message}", file=sys.stderr)
    raise typer.Exit(USER_ERROR) from None


def _print_json(result: Any) -> None:
    print(json.dumps(dataclasses.asdict(result), indent=1, default=str))


def _print_evaluation(result: "Evaluation") -> None:
    """Print one line a model and measure, and the share of each gap that training closed."""
    table = Table(title=f"Held-out text, {result.num_tokens:,} tokens", title_justify="left")
    table.add_column("model")
    measures = {
        "loss": "loss (nats)",
        "perplexity": "perplexity",
        "kl": "KL to teacher (nats)",
        "agreement": "top-1 agreement",
    }
    for heading in measures.values():
        table.add_column(heading, justify="right")
    for name, quality in result.models.items():
        values = dataclasses.asdict(quality)
        table.add_row(name, *(_measure(measure, values[measure]) for measure in measures))
    if result.gap_closed:
        shares = [result.gap_closed[measure] for measure in measures]
        table.add_section()
        table.add_row("gap closed", *("-" if share is None else f"{share:.1%}" for share in shares))
    Console().print(table)


def _measure(name: str, value: float) -> str:
    return f"{value:.1%}" if name == "agreement" else f"{value:.2f}" if name == "perplexity" else f"{value:.4f}"


if __name__ == "__main__":
    main()
