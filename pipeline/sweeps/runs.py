"""The runs of a sweep: which there are, and which of them are to be carried out."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from coldstill.cache.errors import ColdstillError, StoreError
from coldstill.pipeline.judging.results import EVALUATION, read_evaluation
from coldstill.pipeline.outputs.provenance import PROVENANCE_FILE, RECIPE_FILE
from coldstill.pipeline.outputs.run_index import find_run_rows
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.runtime.errors import RecipeError
from coldstill.pipeline.stage_two.run_folder import (
    check_claim,
    claimed_run,
    decisive_sections,
    finished_summary,
    run_key,
)
from coldstill.pipeline.sweeps.file import Sweep
from coldstill.pipeline.sweeps.keys import canonical
from coldstill.pipeline.sweeps.results import output_of
from coldstill.pipeline.sweeps.state import SweepState

# Of `evaluate`, what changes nothing but how fast models are judged.
_IDLE_EVALUATE_KEYS = {"batch_size", "device"}


@dataclass(frozen=True)
class Run:
    """A run to carry out.

    Attributes:
        key: Its name.
        title: The first variant and seed that it is of.
        recipe: Resolved, with its own output.
        file: Where its recipe is.
    """

    key: str
    title: str
    recipe: Recipe
    file: Path


def plan_runs(sweep: Sweep, keys: Mapping[tuple[str, int], str]) -> list[Run]:
    """List the distinct runs of a sweep, seed by seed."""
    runs: dict[str, Run] = {}
    seeds = dict.fromkeys(seed for variant in sweep.variants for seed in variant.recipes)
    for seed in seeds:
        for variant in sweep.variants:
            key = keys[variant.name, seed]
            if key not in runs:
                output = output_of(sweep.output, key)
                recipe = canonical(variant.recipes[seed]).model_copy(update={"output": str(output)})
                title = f"{variant.name}, seed {seed}"
                runs[key] = Run(key, title, recipe, sweep.output / "recipes" / f"{key}.yaml")
    return list(runs.values())


def is_wanted(run: Run, state: SweepState, *, retry: bool) -> bool:
    """Note how a run stands, and say whether it is to be carried out."""
    if is_trained(run.recipe) and is_evaluated(run.recipe):
        state.note(run.key, "complete")
    elif retry or state.status(run.key) != "failed":
        state.note(run.key, "pending")
    return state.status(run.key) == "pending"


def is_trained(recipe: Recipe) -> bool:
    """Whether the recipe's output holds its complete run; where the store is gone, by what decides it of the recipe."""
    if finished_summary(recipe) is None:
        return False
    key = decisive_sections(recipe)
    with suppress(StoreError):
        key = run_key(recipe, find_run_rows(recipe))
    try:
        check_claim(recipe, key)
    except RecipeError:
        return False
    return True


def is_evaluated(recipe: Recipe) -> bool:
    """Whether the recipe's output holds a judgement of its trained student, on its rows, as the recipe asks for it."""
    folder = Path(recipe.output) / EVALUATION
    try:
        if read_evaluation(recipe) is None:
            return False
        record = json.loads((folder / PROVENANCE_FILE).read_text())
        judged_by = load_recipe(folder / RECIPE_FILE)
    except ColdstillError:
        return False
    claimed = claimed_run(recipe)
    return (
        claimed is not None
        and record["store"] == claimed["store"]
        and record["selection"] == claimed["selections"]["eval"]
        and judged_by.evaluate.model_dump(exclude=_IDLE_EVALUATE_KEYS)
        == recipe.evaluate.model_dump(exclude=_IDLE_EVALUATE_KEYS)
    )
