"""Where a recipe writes: held against the file system before any work, and nothing is written to find out."""

import itertools
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import psutil

from coldstill.cache.objects import open_objects
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.runtime.errors import RecipeError

# What the kernel lets nobody keep files on, whatever their permissions say.
_NO_FILES = {
    *("proc", "sysfs", "cgroup", "cgroup2", "debugfs", "tracefs", "securityfs", "configfs", "pstore", "bpf", "mqueue"),
    *("devpts", "binfmt_misc", "efivarfs", "fusectl", "nsfs", "selinuxfs", "devfs"),
}
# Of an output, what training replaces.
_REPLACED = ("checkpoints", "student", "adapters")
KEYS = ("output", "cache", "local_copy")


def beside_stores(recipe: Recipe) -> Path:
    """Return the local folder of what is kept beside the stores, or is a copy of it where these are remote."""
    if "://" not in recipe.cache:
        return Path(recipe.cache)
    if recipe.local_copy is not None:
        return Path(recipe.local_copy)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coldstill"


def check_places(recipe: Recipe, *, models: Mapping[str, Path], written: Collection[str] = KEYS) -> None:
    """Refuse folders that cannot be written, lie in each other, or whose content a run would replace.

    Args:
        recipe: The recipe.
        models: The folders of models that it reads, by key; they may not exist yet.
        written: Which of its places are written, of `KEYS`.

    Raises:
        RecipeError: A folder is wrong; names its key.
        RemoteError: The cache is a URL that nothing here opens.
    """
    for key in ("output", "local_copy"):
        value = getattr(recipe, key)
        if value is not None and "://" in value:
            raise RecipeError(f"{key} is a local folder, got {value}; only cache may be a URL")
    open_objects(recipe.cache)
    folders = {key: Path(value) for key in KEYS if (value := getattr(recipe, key)) is not None and "://" not in value}
    for key in written:
        if key in folders:
            check_writable(key, folders[key])
    for (key, folder), (other, outer) in itertools.permutations(folders.items(), 2):
        if _is_within(folder, outer):
            where = f"is {other} too" if _is_within(outer, folder) else f"is inside {other} {outer}"
            raise RecipeError(f"{key} {folder} {where}: give each a folder of its own")
    for name, model in models.items():
        _keep_apart(folders, name, model)


def _keep_apart(folders: Mapping[str, Path], name: str, model: Path) -> None:
    for key, folder in folders.items():
        if _is_within(folder, model):
            raise RecipeError(f"{key} {folder} is inside {name} {model}, which nothing may change; choose another")
    output = folders["output"]
    if any(_is_within(model, output / part) for part in _REPLACED):
        raise RecipeError(
            f"{name} {model} is inside output {output}, where training would replace it; choose another output"
        )


def check_writable(key: str, folder: Path) -> None:
    """Refuse a folder that could not be made, or not be written to; it is not tried.

    Raises:
        RecipeError: Says why not.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    reason = None
    if not there.is_dir():
        reason = f"{there} is no folder"
    elif not os.access(there, os.W_OK | os.X_OK):
        reason = f"no permission to write in {there}"
    elif (kind := _file_system(there)) in _NO_FILES:
        reason = f"{there} is on {kind}, a file system of the kernel's own"
    if reason is not None:
        raise RecipeError(f"{key} {folder} cannot be written: {reason}; choose another")


def _file_system(folder: Path) -> str | None:
    """Name the kind of file system that a folder is on; None where the system does not say."""
    real = Path(os.path.realpath(folder))
    mounted = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    return next((mounted[path] for path in (real, *real.parents) if path in mounted), None)


def _is_within(folder: Path, outer: Path) -> bool:
    return Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(outer))
