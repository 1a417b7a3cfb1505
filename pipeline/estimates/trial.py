"""A recipe at a small scale: both stages run for real over a few rows, in a folder that is removed afterwards.

What a plan says of bytes, speed and memory is what happened here, not a formula.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldstill.cache.manifest import Manifest
from coldstill.cache.store import CONSTANTS
from coldstill.pipeline.outputs.run_index import RunRows, find_run_rows
from coldstill.pipeline.precompute import PrecomputeSummary, precompute
from coldstill.pipeline.recipe.data import SourceConfig
from coldstill.pipeline.recipe.file import dump_recipe, parse_recipe
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.runtime import program
from coldstill.pipeline.runtime.errors import RecipeError
from coldstill.pipeline.runtime.interruptions import what_stays
from coldstill.pipeline.runtime.peak_memory import release_memory

_STEPS = 2
_EVAL_ROWS = 2
# What a short training run must not do, whatever the recipe says.
_SHORT_RUN = {
    "max_steps": _STEPS,
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "keep": "last",
    "report_to": "none",
}


@dataclass(frozen=True)
class Trial:
    """A trial's recipe, and what stage one did of it.

    Attributes:
        recipe: The recipe, with fewer rows and paths of its own.
        run: Its rows in the trial's store.
        summary: Of stage one.
    """

    recipe: Recipe
    run: RunRows
    summary: PrecomputeSummary

    def bytes_per_token(self) -> dict[str, float]:
        """Return the bytes a token of each column in the trial's store."""
        manifest = Manifest(self.run.store)
        measured = {name: manifest.bytes_per_token(name) for name in manifest.columns()}
        return {name: value for name, value in measured.items() if value is not None}

    def constant_bytes(self) -> dict[str, int]:
        """Return the bytes of what a store holds once: the output head and calibrations."""
        manifest = Manifest(self.run.store)
        named = [name for name in manifest.columns() if (CONSTANTS, name) in manifest]
        return {name: manifest.record(CONSTANTS, name).stored_bytes for name in named}

    def extend(self, sections: Mapping[str, Mapping[str, Any]], *, show_progress: bool) -> dict[str, Recipe]:
        """Compute the columns of variants of the recipe too, by name: each with another `targets` section."""
        variants = {name: varied(self.recipe, {"targets": targets}) for name, targets in sections.items()}
        precompute(*variants.values(), show_progress=show_progress)
        return variants

    def train_memory_bytes(self) -> int:
        """Train a few steps in a process of its own, and return the most memory that it held.

        Raises:
            RecipeError: Training fails; says what it said last.
        """
        release_memory()
        recipe = Path(self.recipe.output) / "trial.yaml"
        recipe.write_text(dump_recipe(self.recipe))
        command = [sys.executable, *program.PROGRAM, "train", str(recipe), "--json"]
        # The child finds the program where this process found it.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)  # noqa: S603
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            raise RecipeError(f"two steps of training, to measure its memory, failed: {last}")
        return int(json.loads(done.stdout)["peak_memory_bytes"])


@contextlib.contextmanager
def trial_of(recipe: Recipe, *, num_rows: int, show_progress: bool) -> Iterator[Trial]:
    """Run stage one of a recipe over a few of its rows, in a temporary folder that goes with the context.

    Raises:
        ColdstillError: What `precompute` raises of the recipe.
    """
    with (
        what_stays(lambda: "with nothing kept, as a plan keeps nothing"),
        tempfile.TemporaryDirectory(prefix="coldstill-plan-") as folder,
    ):
        steps = _STEPS * int(recipe.train.get("gradient_accumulation_steps", 1))
        rows_of_steps = steps * int(recipe.training["per_device_train_batch_size"])
        data = recipe.data
        changes = {
            "output": str(Path(folder) / "run"),
            "cache": str(Path(folder) / "caches"),
            "local_copy": None,
            "data": {
                "train": {"max_rows": min(data.train.max_rows or num_rows, max(num_rows, rows_of_steps))},
                "eval": _few_rows(data.eval),
            },
            "train": _SHORT_RUN,
        }
        small = varied(recipe, changes)
        Path(small.output).mkdir(parents=True)
        summary = precompute(small, show_progress=show_progress)
        yield Trial(small, find_run_rows(small), summary)


def varied(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return a recipe with some keys changed, section by section."""
    return parse_recipe(_merged(recipe.model_dump(), changes), name="plan")


def _few_rows(source: SourceConfig | Sequence[SourceConfig]) -> Any:
    """Return what changes a source of eval rows, or the list of them, to few rows of each."""
    if isinstance(source, SourceConfig):
        return {"max_rows": min(source.max_rows or _EVAL_ROWS, _EVAL_ROWS)}
    return [{**one.model_dump(), **_few_rows(one)} for one in source]


def _merged(data: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(data)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(data.get(key), dict)
        merged[key] = _merged(data[key], value) if nested else value
    return merged
