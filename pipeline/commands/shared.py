"""What commands share: their arguments, how recipes are loaded, where libraries print, how a summary is printed.

Each command imports its stage's function inside itself: importing torch takes seconds, and `--help` answers at once.
"""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from coldstill.pipeline.runtime.errors import RecipeError

if TYPE_CHECKING:
    from coldstill.pipeline.recipe.sections import Recipe

RecipesArgument = Annotated[
    list[str],
    typer.Argument(metavar="RECIPE|KEY=VALUE", help="Recipes, and changes to all of them.", show_default=False),
]
RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to it, such as loss.temperature=3.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")]

_FILE_WIDTH = 160


def load_one_recipe(recipe: Path, overrides: list[str] | None, *, command: str) -> "Recipe":
    """Load a command's only recipe, and say what of it has no effect, or will be slow here.

    Raises:
        RecipeError: It cannot be read, is wrong, or is not the only one.
    """
    quieten_libraries()
    from coldstill.pipeline.recipe.file import load_recipe

    file, changes = one_file(recipe, overrides)
    loaded = load_recipe(file, changes)
    _print_notes([loaded], command)
    return loaded


def load_recipes(arguments: list[str], *, command: str) -> "list[Recipe]":
    """Load several recipes, each with all the overrides, and say the same of them, each note once.

    Raises:
        RecipeError: One of them cannot be read or is wrong, or there is none.
    """
    quieten_libraries()
    from coldstill.pipeline.recipe.file import load_recipe

    files, overrides = _files_and_overrides(arguments, "recipe")
    recipes = [load_recipe(Path(file), overrides) for file in files]
    _print_notes(recipes, command)
    return recipes


def one_file(first: Path, rest: list[str] | None, *, what: str = "recipe") -> tuple[Path, list[str]]:
    """Tell a command's file from the changes to it, wherever it stands among them.

    Raises:
        RecipeError: There is none, or more than one.
    """
    files, overrides = _files_and_overrides([str(first), *(rest or [])], what)
    others = [file for file in files[1:] if Path(file).exists() or Path(file).suffix in (".yaml", ".yml")]
    if others:
        raise RecipeError(f"one {what} is taken, got {files[0]} and {', '.join(others)}")
    # What is neither a file nor a change is said to be no change.
    return Path(files[0]), [*overrides, *files[1:]]


def _files_and_overrides(arguments: list[str], what: str) -> tuple[list[str], list[str]]:
    """Tell files from overrides: an argument with `=` that is no file is an override."""
    overrides = [argument for argument in arguments if "=" in argument and not Path(argument).exists()]
    files = [argument for argument in arguments if argument not in overrides]
    if not files:
        raise RecipeError(f"no {what} among {' '.join(arguments)}; name a YAML file, and then the changes to it")
    return files, overrides


def _print_notes(recipes: "list[Recipe]", command: str) -> None:
    """Say on standard error which keys of recipes do nothing, and what a command bears with on this machine."""
    if not speaks():
        return
    with libraries_print_to_stderr():
        from coldstill.pipeline.models.machine import machine_notes

        notes = [note for recipe in recipes for note in (*recipe.idle_keys(), *machine_notes(recipe, command))]
    for note in dict.fromkeys(notes):
        typer.echo(f"coldstill: {note}", err=True)


@contextlib.contextmanager
def libraries_print_to_stderr() -> Iterator[None]:
    """Send to standard error what is printed meanwhile: standard output is the summary's alone.

    A command imports its stage in here too: transformers prints when it is imported, of WANDB_MODE for one.
    """
    with contextlib.redirect_stdout(sys.stderr):
        yield


def speaks() -> bool:
    """Whether this process prints: under torchrun or accelerate launch, the first one speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def print_lines(lines: Iterable[str]) -> None:
    """Print a summary line by line."""
    for line in lines:
        print(line)


def console() -> Console:
    """Return the screen, or for a file or a pipe one that is wide enough for every table."""
    screen = Console()
    return screen if screen.is_terminal else Console(width=_FILE_WIDTH)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where it is not one."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def quieten_libraries() -> None:
    """Leave the screen to this program's own progress; warnings and errors still come through."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def print_json(result: Any) -> None:
    """Print a summary as JSON."""
    print(json.dumps(result, indent=1, default=_json_default))


def _json_default(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return sorted(value) if isinstance(value, set) else str(value)
