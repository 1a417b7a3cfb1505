"""Recipes as YAML files: read with dotted overrides, written resolved, and one helpful line for each mistake."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from cache.errors import RecipeError
from pipeline.config import Recipe


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides such as `loss.temperature=3`, values in YAML.

    Raises:
        RecipeError: The file is missing or no YAML, a key is unknown, or a value is wrong; names the key.
    """
    try:
        data = parse_yaml(path.read_text())
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"recipe {path} must be a map of sections, got {type(data).__name__}")
    for override in overrides:
        _apply_override(data, override)
    return parse_recipe(data, name=str(path))


def parse_recipe(data: Mapping[str, Any], *, name: str) -> Recipe:
    """Check a recipe that is a map already; `name` stands for it in errors."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(_one_line(error, name)) from None


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


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.split(".")
    if not separator or not all(parts):
        raise RecipeError(f"override {override!r} must look like section.key=value")
    section = data
    for part in parts[:-1]:
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            raise RecipeError(f"override {override!r}: {part} is a value, not a section")
    try:
        section[parts[-1]] = parse_yaml(text)
    except yaml.YAMLError:
        raise RecipeError(f"override {override!r}: {text!r} is not a YAML value") from None


def _one_line(error: ValidationError, name: str) -> str:
    """Say the first thing that is wrong: unknown keys before values, since a misspelt key explains a missing one."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    # Pydantic names the branch of a union that it tried, such as `literal['none']`: that is no key.
    location = [str(part) for part in problem["loc"] if "[" not in str(part)]
    rest = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(location[-1], _known_keys(location[:-1]), n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(_known_keys(location[:-1]))}"
        return f"unknown key {'.'.join(location)!r} in {name}; {hint}{rest}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"missing key {'.'.join(location)!r} in {name}{rest}"
    got = "" if isinstance(problem["input"], dict) else f", got {problem['input']!r}"
    where = f"{'.'.join(location)} in {name}" if location else name
    return f"{where}: {message}{got}{rest}"


def _known_keys(location: Sequence[str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in location:
        candidates = [
            section.model_fields[part].annotation,
            *getattr(section.model_fields[part].annotation, "__args__", ()),
        ]
        section = next(item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel))
    return list(section.model_fields)
