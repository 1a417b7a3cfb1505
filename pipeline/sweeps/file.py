"""A sweep as a YAML file: a base recipe, what its variants change of it, and the seeds; resolved before anything runs.

Knows nothing of runs and folders but their place; `coldstill.pipeline.ablate` carries a sweep out.
"""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, field_validator, model_validator

from coldstill.pipeline.recipe.fields import Place, Section
from coldstill.pipeline.recipe.file import (
    apply_changes,
    apply_overrides,
    parse_model,
    parse_recipe,
    read_map,
    read_sweep_map,
    set_key,
)
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.runtime.errors import RecipeError

_DEFAULT_SEED = 42
# What no variant may change, and what decides it.
_OWNED = {
    "output": "the sweep's output",
    "train.seed": "the sweep's seeds",
    "teacher": "the base recipe: one teacher serves a sweep",
    "cache": "the base recipe: one cache serves a sweep",
    "local_copy": "the base recipe: one cache serves a sweep",
}


class SweepConfig(Section):
    """A whole sweep, as its file says it; the README explains every key."""

    name: str | None = None
    output: Place
    recipe: Any
    overrides: Any = ()
    seeds: list[int] | None = None
    variants: dict[str, Any] = Field(default={})
    grid: dict[str, list[Any]] = Field(default={})

    @field_validator("recipe")
    @classmethod
    def _check_recipe(cls, value: Any) -> Any:
        return _required(value, isinstance(value, str | dict), "takes a recipe's path, or the recipe itself as a map")

    @field_validator("overrides")
    @classmethod
    def _check_overrides(cls, value: Any) -> Any:
        is_list = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
        right = is_list or _is_changes(value)
        return _required(value, right, "takes a map of dotted keys to values, or a list of section.key=value")

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, value: list[int] | None) -> list[int] | None:
        right = value is None or (len(set(value)) == len(value) > 0 and min(value) >= 0)
        return _required(value, right, "takes at least one whole number from 0, and none twice")

    @field_validator("variants")
    @classmethod
    def _check_variants(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, changes in value.items():
            right = changes is None or _is_changes(changes)
            _required(value, right, f"variant {name!r} takes a map of dotted keys to values")
        return {name: changes or {} for name, changes in value.items()}

    @field_validator("grid")
    @classmethod
    def _check_grid(cls, value: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for key, values in value.items():
            right = len({_shown(item) for item in values}) == len(values) > 0
            _required(value, right, f"{key} takes at least one value, and none twice")
        return value

    @model_validator(mode="after")
    def _check(self) -> "SweepConfig":
        changes = {f"variant {name!r}": changes for name, changes in self.variants.items()}
        for where, keys in {**changes, "grid": self.grid}.items():
            for key in keys:
                owner = _owner(key)
                _required(key, owner is None, f"{where} sets {key}, which is decided by {owner}")
                both = where != "grid" and key in self.grid
                _required(key, not both, f"{where} and grid both set {key}")
        return self


@dataclass(frozen=True)
class Variant:
    """A point of a sweep, and its recipe for each seed.

    Attributes:
        name: The variant's name, the grid point, or both.
        changes: What it changes of the base recipe, by dotted key.
        recipes: Seed to recipe; their outputs are not yet decided.
    """

    name: str
    changes: dict[str, Any]
    recipes: dict[int, Recipe]


@dataclass(frozen=True)
class Sweep:
    """A sweep, resolved and checked.

    Attributes:
        name: Its name, the file's where it has no other.
        output: Its folder.
        variants: In the order of the file; within a variant, grid points in the order of the grid's keys.
    """

    name: str
    output: Path
    variants: list[Variant]


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep, and resolve and check every recipe of it.

    Args:
        path: The sweep file; a recipe that it names is looked for beside it.
        overrides: Changes to the base recipe, such as `train.max_steps=10`; variants still have the last word.

    Raises:
        RecipeError: The sweep, its base recipe or a variant is wrong; names which, and the key.
    """
    config = parse_model(SweepConfig, read_sweep_map(path), name=str(path))
    plain, base = _base(config, path, ()), _base(config, path, overrides)
    seeds = config.seeds or [_own_seed(base)]
    variants = []
    for name, changes in _points(config):
        where = f"variant {name!r} of {path}" + (f" over {config.recipe}" if isinstance(config.recipe, str) else "")
        data = copy.deepcopy(base)
        for key, value in changes.items():
            set_key(data, key, copy.deepcopy(value), name=f"{where}, {key}")
        # What a variant changes is its own.
        blamed = [override for override in overrides if override.partition("=")[0] not in changes]
        recipes = {seed: _seeded(data, seed, where, blamed, plain) for seed in seeds}
        variants.append(Variant(name, changes, recipes))
    return Sweep(config.name or path.stem, Path(config.output), variants)


def _base(config: SweepConfig, path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the base recipe as a map, changed by the sweep's overrides and then by the command line's."""
    if isinstance(config.recipe, str):
        data = read_map(path.parent / Path(config.recipe).expanduser(), what="recipe")
    else:
        data = copy.deepcopy(config.recipe)
    data["output"] = config.output
    own = config.overrides
    if isinstance(own, dict):
        apply_changes(data, [(f"overrides of {path}, {key}", key, value) for key, value in own.items()])
    # The command line's come last, and may say otherwise than the sweep's own.
    for group in (() if isinstance(own, dict) else own, overrides):
        for override in group:
            if override.partition("=")[0] == "output":
                raise RecipeError(f"override {override!r}: where a sweep's runs go is decided by output in {path}")
        apply_overrides(data, group)
    return data


def _own_seed(base: Mapping[str, Any]) -> Any:
    train = base.get("train")
    return train.get("seed", _DEFAULT_SEED) if isinstance(train, dict) else _DEFAULT_SEED


def _points(config: SweepConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and changes of every variant at every grid point; the base alone where there are neither."""
    for variant, changes in (config.variants or {"": {}}).items():
        for values in itertools.product(*config.grid.values()):
            point = dict(zip(config.grid, values, strict=True))
            parts = [variant, *(f"{key}={_shown(value)}" for key, value in point.items())]
            yield ", ".join(filter(None, parts)) or "base", {**changes, **point}


def _seeded(
    data: Mapping[str, Any], seed: int, where: str, overrides: Sequence[str], plain: Mapping[str, Any]
) -> Recipe:
    seeded = copy.deepcopy(dict(data))
    set_key(seeded, "train.seed", seed, name=where)
    return parse_recipe(seeded, name=where, overrides=overrides, unchanged=plain)


def _shown(value: Any) -> str:
    """Return a value as one writes it in a line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).strip()
    return text.removesuffix("...").strip()


def _required(value: Any, right: bool, message: str) -> Any:
    """Return a value back that is right."""
    if not right:
        raise ValueError(message)
    return value


def _is_changes(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) and all(key.split(".")) for key in value)


def _owner(key: str) -> str | None:
    """Say what decides a dotted key that no variant may change."""
    return next((owner for owned, owner in _OWNED.items() if f"{key}.".startswith(f"{owned}.")), None)
