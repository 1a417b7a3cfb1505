"""Recipes as YAML files: read with dotted overrides, written resolved, and one helpful line for each mistake."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from cache.errors import RecipeError
from pipeline.config import Recipe

_Model = TypeVar("_Model", bound=BaseModel)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides such as `loss.temperature=3`, values in YAML.

    Raises:
        RecipeError: The file is missing or no YAML, a key is unknown, or a value is wrong; names the key.
    """
    data = read_map(path, what="recipe")
    for override in overrides:
        apply_override(data, override)
    return parse_recipe(data, name=str(path))


def parse_recipe(data: Mapping[str, Any], *, name: str) -> Recipe:
    """Check a recipe that is a map already; `name` stands for it in errors."""
    return parse_model(Recipe, data, name=name)


def read_map(path: Path, *, what: str) -> dict[str, Any]:
    """Read a YAML file that holds a map; `what` says in errors what the file is.

    Raises:
        RecipeError: The file is missing, no YAML, or no map.
    """
    try:
        data = parse_yaml(path.read_text())
    except FileNotFoundError:
        raise RecipeError(f"no {what} at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{what} {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{what} {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{what} {path} must be a map of sections, got {type(data).__name__}")
    return data


def parse_model(model: type[_Model], data: Mapping[str, Any], *, name: str) -> _Model:
    """Check a map against a strict model; `name` stands for it in errors.

    Raises:
        RecipeError: A key is unknown, with the nearest known one, or a value is wrong.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise RecipeError(_one_line(error, model, name)) from None


def dump_recipe(recipe: Recipe) -> str:
    """Give the resolved recipe, every default written out, as YAML that `load_recipe` reads back."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but with YAML 1.2's floats: `1e-4` is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    """Parse YAML in which `1e-4` is a number, as a person means it."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader


def apply_override(data: dict[str, Any], override: str) -> None:
    """Apply a change such as `loss.temperature=3`, its value in YAML, to a recipe that is a map still.

    Raises:
        RecipeError: It does not look like one, or leads through a value.
    """
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise RecipeError(f"override {override!r} must look like section.key=value")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        raise RecipeError(f"override {override!r}: {text!r} is not a YAML value") from None
    set_key(data, key, value, name=f"override {override!r}")


def set_key(data: dict[str, Any], key: str, value: Any, *, name: str) -> None:
    """Set a dotted key of a recipe that is a map still; sections that are missing are made.

    Raises:
        RecipeError: It leads through a value; `name` stands for the change.
    """
    *parents, last = key.split(".")
    section = data
    for part in parents:
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            raise RecipeError(f"{name}: {part} is a value, not a section")
    section[last] = value


def _one_line(error: ValidationError, model: type[BaseModel], name: str) -> str:
    """Say the first thing that is wrong: unknown keys before values, since a misspelt key explains a missing one."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    # Pydantic names the branch of a union that it tried, such as `literal['none']`: that is no key.
    location = [str(part) for part in problem["loc"] if "[" not in str(part)]
    rest = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(location[-1], _known_keys(model, location[:-1]), n=1)
        hint = (
            f"did you mean {nearest[0]!r}?"
            if nearest
            else f"known keys: {', '.join(_known_keys(model, location[:-1]))}"
        )
        return f"unknown key {'.'.join(location)!r} in {name}; {hint}{rest}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"missing key {'.'.join(location)!r} in {name}{rest}"
    got = "" if isinstance(problem["input"], dict) else f", got {problem['input']!r}"
    where = f"{'.'.join(location)} in {name}" if location else name
    return f"{where}: {message}{got}{rest}"


def _known_keys(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    section = model
    for part in location:
        candidates = [
            section.model_fields[part].annotation,
            *getattr(section.model_fields[part].annotation, "__args__", ()),
        ]
        section = next(item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel))
    return list(section.model_fields)
