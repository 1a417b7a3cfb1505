"""Every kind of logits target and every form of hidden state trains from the store through the command line."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldstill.cache.errors import IdentityError
from coldstill.cache.inventory import remove_column
from coldstill.cache.manifest import Manifest
from coldstill.cache.reader import read_constants
from coldstill.cache.store import CONSTANTS, Store
from coldstill.pipeline.outputs.run_index import find_run_rows
from coldstill.pipeline.precompute import precompute
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.targets.calibrations import write_calibration
from coldstill.pipeline.targets.stored_constants import read_codes
from coldstill.pipeline.targets.transform_coding import TransformCode
from coldstill.pipeline.train import train

LOGITS = {
    "topk": {"kind": "topk", "k": 16, "temperatures": [1, 2]},
    "sampled": {"kind": "topk_sampled", "k": 16, "samples": 8, "temperatures": [1, 2]},
    "coded": {"kind": "final"},
    "int8": {"kind": "final", "encoding": "int8"},
}

CODED = {"logits": {"kind": "final"}, "hidden": {"encoding": "coded"}}
CALIBRATIONS = [f"calibration/{name}" for name in ("hidden/0", "hidden/1", "hidden/2", "logits/final")]


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("hidden", [{}, {"encoding": "coded", "token_fraction": 0.5}], ids=["int8", "coded"])
def test_a_run_of_both_stages(write_recipe: Callable[..., Path], coldstill: Callable[..., Any], kind: str, hidden: Any):
    recipe = write_recipe(targets={"logits": LOGITS[kind], "hidden": hidden})
    coldstill("precompute", recipe)
    assert "nothing: all columns are complete" in coldstill("precompute", recipe).output
    trained = json.loads(coldstill("train", recipe, "--json").stdout)
    assert {"loss_task", "loss_logits", "loss_hidden"} <= trained["losses"].keys()
    assert all(math.isfinite(value) for value in trained["losses"].values())


@pytest.fixture
def coded(write_recipe: Callable[..., Path]) -> tuple[Recipe, Store]:
    """A recipe of coded columns, and the store that holds them in three shards or so."""
    recipe = load_recipe(write_recipe(targets=CODED))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coldstill.cache.laying.SHARD_TOKENS", 240)
        precompute(recipe, show_progress=False)
    return recipe, find_run_rows(recipe).store


def arrays_below(store: Store, folder: str) -> dict[str, bytes]:
    """Every file of the hierarchy, but for root metadata."""
    root = Path(store.path, "arrays.zarr", folder)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_another_step_is_another_column_of_the_same_calibration(
    coded: tuple[Recipe, Store], write_recipe: Callable[..., Path]
):
    _, store = coded
    assert set(CALIBRATIONS) <= {name for name in Manifest(store).columns() if name.startswith("calibration/")}
    constants, shards = arrays_below(store, "constants"), arrays_below(store, "shards")
    finer = {"logits": {"kind": "final", "step": 0.01}, "hidden": {"encoding": "coded", "step": 0.1}}
    recipe = load_recipe(write_recipe(targets=finer))
    assert precompute(recipe, show_progress=False).computed_tokens == 26 * 24
    assert arrays_below(store, "constants") == constants
    after = arrays_below(store, "shards")
    assert {name: after[name] for name in shards} == shards
    manifest = Manifest(store)
    new = ("logits/final/coded_0.01", "hidden/1/coded_0.1")
    assert set(new) <= set(manifest.columns())
    for name, old in zip(new, ("logits/final/coded_0.03", "hidden/1/coded_0.2"), strict=True):
        for shard in manifest.shards(old):
            first, second = (manifest.record(shard, each).column.attributes for each in (old, name))
            assert first["calibration"] == second["calibration"]
            assert first["step"] > second["step"]


@pytest.mark.parametrize("column", ["logits/final/coded_0.03", "hidden/1/coded_0.2"])
@pytest.mark.parametrize("with_calibration", [False, True], ids=["column", "column and calibration"])
def test_a_coded_column_that_was_removed_comes_back_with_the_same_bytes(
    coded: tuple[Recipe, Store], column: str, with_calibration: bool
):
    recipe, store = coded
    before = {folder: arrays_below(store, folder) for folder in ("shards", "constants")}
    remove_column(store, column)
    if with_calibration:
        remove_column(store, f"calibration/{column.rpartition('/')[0]}")
    assert column not in Manifest(store).columns()
    assert len(arrays_below(store, "shards")) < len(before["shards"])
    assert precompute(recipe, show_progress=False).computed_tokens == 26 * 24
    assert {folder: arrays_below(store, folder) for folder in before} == before


@pytest.mark.parametrize("column", ["logits/tail/16_8/1_2", "hidden/1/int8_sampled_0.5"])
def test_a_column_of_chance_that_was_removed_comes_back_with_the_same_bytes(
    write_recipe: Callable[..., Path], column: str
):
    sampled = {"logits": LOGITS["sampled"], "hidden": {"encoding": "int8", "token_fraction": 0.5}}
    recipe = load_recipe(write_recipe(targets=sampled))
    precompute(recipe, show_progress=False)
    store = find_run_rows(recipe).store
    before = arrays_below(store, "shards")
    remove_column(store, column)
    assert precompute(recipe, show_progress=False).computed_tokens == 26 * 24
    assert arrays_below(store, "shards") == before


@pytest.mark.parametrize("column", ["logits/final/coded_0.03", "hidden/1/coded_0.2"])
def test_a_calibration_that_is_not_the_one_a_shard_was_coded_with_is_refused(coded: tuple[Recipe, Store], column: str):
    recipe, store = coded
    name = f"calibration/{column.rpartition('/')[0]}"
    fitted = read_codes(store, Manifest(store), [column])[column]
    other = TransformCode(fitted.centre_D + 1e-6, fitted.analysis_DD, fitted.synthesis_DD, fitted.spread_D)
    attributes = read_constants(store, name)[1].column.attributes
    remove_column(store, name)
    described = {key: attributes[key] for key in ("num_positions", "metric")}
    write_calibration(store, Manifest(store), name, other, **described)
    assert (CONSTANTS, name) in Manifest(store)
    message = (
        rf"column {column} was coded with another calibration: \w{{12}} there, \w{{12}} now; run: coldstill cache rm"
    )
    with pytest.raises(IdentityError, match=message):
        train(recipe)
    with pytest.raises(IdentityError, match=message):
        read_codes(store, Manifest(store), [column])
