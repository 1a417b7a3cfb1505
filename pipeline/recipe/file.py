"""Recipes as YAML files: read with dotted overrides, written resolved, and one helpful line for each mistake."""

import copy
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.recipe.yaml_text import parse_yaml
from coldstill.pipeline.runtime.errors import RecipeError

_Model = TypeVar("_Model", bound=BaseModel)
# What a recipe has and a sweep has not.
_RECIPE_KEYS = ("teacher", "data", "student", "targets", "mapping", "projector", "loss", "train", "evaluate")
# Where a run's folder has the recipe that made it.
_RECORDED = ("student/recipe.yaml", "checkpoints/recipe.yaml", "precompute/recipe.yaml")


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides such as `loss.temperature=3`, values in YAML.

    Raises:
        RecipeError: The file is missing, no YAML or a sweep, a key is unknown or given twice, or a value is wrong;
            names the key, and the override where that is at fault.
    """
    data = read_map(path, what="recipe")
    if "recipe" in data and not any(key in data for key in _RECIPE_KEYS):
        output = f"; its report: coldstill report {data['output']}" if isinstance(data.get("output"), str) else ""
        raise RecipeError(f"{path} is a sweep, which coldstill ablate {path} carries out{output}")
    changed = copy.deepcopy(data)
    apply_overrides(changed, overrides)
    return parse_recipe(changed, name=str(path), overrides=overrides, unchanged=data)


def parse_recipe(
    data: Mapping[str, Any],
    *,
    name: str,
    overrides: Sequence[str] = (),
    unchanged: Mapping[str, Any] | None = None,
) -> Recipe:
    """Check a recipe that is a map already.

    Args:
        data: The map, with overrides applied.
        name: What stands for it in errors.
        overrides: What was applied, to be named where it is at fault.
        unchanged: The map without them.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(_one_line(error, Recipe, name, overrides, unchanged or {})) from None


def read_sweep_map(path: Path) -> dict[str, Any]:
    """Read the map of a sweep file.

    Raises:
        RecipeError: The file is missing, no YAML, no map, or a recipe.
    """
    data = read_map(path, what="sweep")
    if "recipe" not in data and any(key in data for key in _RECIPE_KEYS):
        raise RecipeError(
            f"{path} is a recipe, which coldstill train {path} takes; a sweep names it as `recipe`, beside its variants"
        )
    return data


def read_map(path: Path, *, what: str) -> dict[str, Any]:
    """Read a YAML file that holds a map; `what` says in errors what the file is.

    Raises:
        RecipeError: The file is missing, no YAML, or no map, or gives a key twice.
    """
    path = path.expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"no {what} at {path}") from None
    except IsADirectoryError:
        recorded = [path / name for name in _RECORDED if (path / name).is_file()]
        made_by = f"; the one that made what is there: {recorded[0]}" if recorded else ""
        raise RecipeError(f"{path} is a folder, and a {what} is a YAML file{made_by}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{what} {path} cannot be read: {error}") from None
    data = parse_yaml(text, name=f"{what} {path}")
    if data is None:
        raise RecipeError(f"{what} {path} is empty")
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
    """Return the resolved recipe, every default written out, as YAML that `load_recipe` reads back."""
    resolved = {**recipe.model_dump(), "train": recipe.training}
    return yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> None:
    """Apply changes such as `loss.temperature=3`, their values in YAML, to a recipe that is a map still.

    Raises:
        RecipeError: One does not look like a change, leads through a value, or is undone by another.
    """
    changes = []
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not all(key.split(".")):
            raise RecipeError(f"override {override!r} must look like section.key=value")
        name = f"override {override!r}"
        changes.append((name, key, parse_yaml(text, name=name, key=key)))
    apply_changes(data, changes)


def apply_changes(data: dict[str, Any], changes: Sequence[tuple[str, str, Any]]) -> None:
    """Set dotted keys of a recipe that is a map still; each change is what it is called, its key and its value.

    Raises:
        RecipeError: One leads through a value, or is undone by one behind it.
    """
    for name, key, value in changes:
        set_key(data, key, copy.deepcopy(value), name=name)
    for place, (name, key, value) in enumerate(changes):
        for path, said in _leaves(tuple(key.split(".")), value):
            found = _at(data, path)
            # Null removes a section, which a change behind it may fill anew.
            if found is said or found == said or (said is None and isinstance(found, dict)):
                continue
            later = [other for other, changed, _ in changes[place + 1 :] if _is_along(path, changed.split("."))]
            dotted = ".".join(map(str, path))
            raise RecipeError(f"{name} is undone by {later[-1]}: {dotted} is given twice; keep one")


def _leaves(path: tuple[Any, ...], value: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield each value that a change says, with its path; an empty map says none."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves((*path, name), item)
    else:
        yield path, value


def _at(data: Any, path: Sequence[Any]) -> Any:
    for part in path:
        data = data.get(part) if isinstance(data, dict) else None
    return data


def _is_along(path: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether one path leads through the other, whichever is the longer."""
    return all(str(one) == str(two) for one, two in zip(path, other, strict=False))


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


def _one_line(
    error: ValidationError,
    model: type[BaseModel],
    name: str,
    overrides: Sequence[str] = (),
    unchanged: Mapping[str, Any] | None = None,
) -> str:
    """Say the first thing that is wrong: unknown keys before values, since a misspelt key explains a missing one."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    # Pydantic names the branch of a union that it tried, such as `literal['none']`: that is no key.
    location = [str(part) for part in problem["loc"] if "[" not in str(part)]
    message = problem["msg"].removeprefix("Value error, ")
    name = _at_fault(location, message, overrides, unchanged or {}) or name
    rest = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        return f"unknown key {'.'.join(location)!r} in {name}; {_nearest(model, location)}{rest}"
    if problem["type"] == "missing":
        return f"missing key {'.'.join(location)!r} in {name}{rest}"
    got = "" if isinstance(problem["input"], dict) else f", got {problem['input']!r}"
    where = f"{'.'.join(location)} in {name}" if location else name
    return f"{where}: {message}{got}{rest}"


def _at_fault(
    location: Sequence[str], message: str, overrides: Sequence[str], unchanged: Mapping[str, Any]
) -> str | None:
    """Name the override that put something wrong at a location; None where the file did."""
    for override in reversed(overrides):
        key = override.partition("=")[0].split(".")
        if not _is_along(location, key):
            continue
        was_there = _at(unchanged, location) is not None
        # What is wrong of a whole section names the key.
        is_named = re.search(rf"\b{re.escape(key[-1])}\b", message) is not None
        if len(key) <= len(location) or not was_there or is_named:
            return f"override {override!r}"
    return None


def _nearest(model: type[BaseModel], location: Sequence[str]) -> str:
    """Name the known key that was meant, or all."""
    *sections, key = location
    known = _known_keys(model, sections)
    nearest = difflib.get_close_matches(key, known, n=1)
    # A key without its section, as an override may have it.
    nearest += [f"{name}.{key}" for name in known if key in _known_keys(model, [*sections, name])]
    return f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(known)}"


def _known_keys(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """Name the keys of the section at a location; none where there is no section."""
    section = model
    for place, part in enumerate(location):
        if part.isdigit():
            continue  # of a list, whose sections are all of one kind
        is_list = place + 1 < len(location) and location[place + 1].isdigit()
        found = _sections(section.model_fields[part].annotation)
        if not found:
            return []
        section = found[-1] if is_list else found[0]
    return list(section.model_fields)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that an annotation names, one that a list holds last."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]
