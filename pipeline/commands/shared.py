"""What commands share: their arguments, how a stage is called, and how a summary is printed as JSON.

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
from pathlib import Path
from typing import Annotated, Any

import typer
from coldstill.cache.errors import RecipeError

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


def run_stage(name: str, recipe: Path, overrides: list[str] | None, **options: Any) -> Any:
    """Load the recipe and call the stage's function."""
    quieten_libraries()
    from coldstill.pipeline.recipe.file import load_recipe

    file, changes = one_file(recipe, overrides)
    loaded = load_recipe(file, changes)
    _say_notes(loaded, name)
    return call(name, loaded, **options)


def call(name: str, *arguments: Any, **options: Any) -> Any:
    """Call a stage; what libraries print meanwhile goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr):  # while they are imported, too: transformers speaks of WANDB_MODE then
        module = importlib.import_module(f"coldstill.pipeline.{name}")
        stage = getattr(module, name.rpartition(".")[2])
        return stage(*arguments, **options)


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


def load_recipes(arguments: list[str]) -> list[Any]:
    """Load recipes, each with all the overrides."""
    quieten_libraries()
    from coldstill.pipeline.recipe.file import load_recipe

    files, overrides = _files_and_overrides(arguments, "recipe")
    recipes = [load_recipe(Path(file), overrides) for file in files]
    for note in dict.fromkeys(note for recipe in recipes for note in _notes(recipe, "precompute")):
        typer.echo(f"coldstill: {note}", err=True)
    return recipes


def _say_notes(recipe: Any, stage: str) -> None:
    for note in _notes(recipe, stage):
        typer.echo(f"coldstill: {note}", err=True)


def _notes(recipe: Any, stage: str) -> list[str]:
    """Give, where this process speaks, which keys of a recipe do nothing, and what a stage bears with here."""
    if not speaks():
        return []
    with contextlib.redirect_stdout(sys.stderr):
        from coldstill.pipeline.models.machine import machine_notes

        return [*recipe.idle_keys(), *machine_notes(recipe, stage)]


def speaks() -> bool:
    """Whether this process prints: under torchrun or accelerate launch, the first one speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def print_lines(lines: Iterable[str]) -> None:
    """Print a summary line by line."""
    for line in lines:
        print(line)


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
