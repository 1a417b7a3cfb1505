"""The record beside every output: the resolved recipe, and where, when and with what it was made."""

import functools
import json
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from coldstill.pipeline.recipe.file import dump_recipe
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.runtime.whole import write_whole

RECIPE_FILE = "recipe.yaml"
PROVENANCE_FILE = "provenance.json"

_PACKAGES = (
    "coldstill",
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "safetensors",
    "tokenizers",
    "zarr",
    "numcodecs",
    "numpy",
)


def write_record(folder: Path, recipe: Recipe, facts: Mapping[str, Any]) -> None:
    """Write `recipe.yaml` and `provenance.json` into a folder, which is made where it is missing.

    Args:
        folder: The output that they describe.
        recipe: What made it.
        facts: JSON-able fingerprints and figures of this run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RECIPE_FILE, dump_recipe(recipe))
    write_whole(folder / PROVENANCE_FILE, json.dumps({**_surroundings(recipe), **facts}, indent=1) + "\n")


def _surroundings(recipe: Recipe) -> dict[str, Any]:
    import torch

    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": sys.argv,
        "seed": recipe.seed,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "cpu_threads": torch.get_num_threads(),
            "accelerator": accelerator,
        },
    }


@functools.cache  # what is installed stays, and is read from files
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
