"""Which columns a recipe asks for, shard by shard, and that computing them together or one by one gives the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldstill.cache.arrays import read_column
from coldstill.cache.columns import ArraySpec, Column
from coldstill.cache.errors import FormatError
from coldstill.cache.inventory import remove_column
from coldstill.cache.manifest import Manifest
from coldstill.cache.writer import write_column
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.outputs.run_index import find_run_rows
from coldstill.pipeline.precompute import precompute
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.runtime.errors import RecipeError
from coldstill.pipeline.stage_one.computing import StoreWork
from coldstill.pipeline.stage_one.requests import Request, gather, needed_targets
from coldstill.pipeline.stage_one.shard_jobs import ShardComputer
from coldstill.pipeline.stage_one.write_behind import WriteBehind
from coldstill.pipeline.targets.chosen_tokens import LargestLogits
from coldstill.pipeline.targets.kinds import stored_targets
from coldstill.pipeline.targets.token_logits import LabelLogit, Normaliser
from coldstill.pipeline.targets.wanted import EVAL_STATE

SAMPLED = {"kind": "topk_sampled", "k": 12, "samples": 5, "temperatures": [1, 2]}


@pytest.fixture
def recipe(write_recipe: Any) -> Any:
    hidden = {"blocks": [0, 2], "encoding": "int8", "token_fraction": 0.5}
    return load_recipe(write_recipe(targets={"logits": SAMPLED, "hidden": hidden}, loss__gamma=0.0))


def demands_of(recipe: Any) -> tuple[Teacher, StoreWork, Any]:
    teacher, gathered = gather([recipe])
    work = StoreWork(recipe.cache, teacher)
    blocks = recipe.targets.hidden.blocks if recipe.targets.hidden.blocks != "none" else []
    return teacher, work, work.register([Request(item, blocks) for item in gathered])


def test_only_eval_rows_are_asked_for_what_evaluation_reads(recipe: Any):
    _, _, demands = demands_of(recipe)
    (demand,) = demands
    needed = needed_targets(demands)
    of_eval = set(demand.selections["eval"].shard_names)
    assert of_eval.isdisjoint(demand.selections["train"].shard_names)
    for shard, targets in needed.items():
        judged = {LabelLogit(), EVAL_STATE} & targets.keys()
        assert bool(judged) == (shard in of_eval)
        assert [target.name for target in targets][:4] == [
            "tokens",
            "logits/topk/12/delta",
            "logsumexp/1",
            "logsumexp/2",
        ]
    assert set(demand.targets["train"].names()) < set(demand.targets["eval"].names())


def test_a_column_with_more_of_the_largest_logits_serves_a_recipe_of_fewer(write_recipe: Any):
    wide, narrow = (
        load_recipe(
            write_recipe(targets={"logits": {"kind": "topk", "k": k}, "hidden": {"blocks": "none"}}, loss__gamma=0.0)
        )
        for k in (16, 8)
    )
    precompute(wide, show_progress=False)
    _, _, demands = demands_of(narrow)
    targets = demands[0].targets["train"].all()
    assert LargestLogits(16, "delta") in targets
    assert LargestLogits(8, "delta") not in targets


def arrays(store: Any, target: Any) -> dict[str, Any]:
    manifest = Manifest(store)
    return {
        f"{shard}/{name}": values.tobytes()
        for shard in manifest.shards(target.name)
        for name, values in read_column(store, manifest.record(shard, target.name)).items()
    }


def test_targets_computed_one_by_one_are_those_computed_together(recipe: Any):
    precompute(recipe, show_progress=False)
    store = find_run_rows(recipe).store
    targets = stored_targets(Manifest(store))
    together = {target: arrays(store, target) for target in targets}
    assert len(targets) == 8
    teacher = Teacher.locate(recipe.teacher)
    for target in targets:
        remove_column(store, target.name)
    manifest = Manifest(store)
    for target in targets:
        _, work, demands = demands_of(recipe)
        jobs = work.missing(demands)
        computer = ShardComputer(
            store, manifest, teacher.parts, batch_size=recipe.teacher.batch_size, row_names=lambda _: {}
        )
        with WriteBehind(store, manifest, lambda _bytes: None) as writer:
            for job in jobs:
                alone = replace(job, targets=tuple(one for one in job.targets if one == target))
                if alone.targets:
                    computer.run([alone], writer, lambda _tokens: None)
        alone, beside = arrays(store, target), together[target]
        if isinstance(target, Normaliser):
            # Temperatures that are computed together share their exponentials, which rounds the last bit otherwise.
            alone, beside = (
                {name: np.frombuffer(one, np.float32) for name, one in of.items()} for of in (alone, beside)
            )
            assert all(np.allclose(alone[name], beside[name], rtol=1e-6) for name in beside)
        else:
            assert alone == beside, target.name
    _, work, demands = demands_of(recipe)
    assert not work.missing(demands)


def test_a_value_that_a_form_does_not_hold_is_refused_by_name(write_recipe: Any, workplace: Path, build_model: Any):
    model = build_model()
    model.model.layers[0].mlp.down_proj.weight.data.mul_(1e6)
    model.save_pretrained(workplace / "teacher")
    hidden = {"blocks": [0], "encoding": "float16"}
    recipe = load_recipe(
        write_recipe(targets={"logits": {"kind": "none"}, "hidden": hidden}, loss__beta=0.0, loss__gamma=0.0)
    )
    with pytest.raises(RecipeError, match=r"column hidden/0/float16 cannot be stored: .*use another encoding, such as"):
        precompute(recipe, show_progress=False)


def test_a_column_of_a_newer_version_stops_what_would_have_to_guess_at_it(recipe: Any):
    precompute(recipe, show_progress=False)
    store = find_run_rows(recipe).store
    manifest = Manifest(store)
    shard = next(iter(manifest.shards("tokens")))
    record = manifest.record(shard, "tokens")
    newer = Column("attention/3/int8", {"values": ArraySpec("float32")})
    values = {"values": np.zeros(record.num_tokens, np.float32)}
    write_column(store, manifest, shard, newer, values, num_tokens=record.num_tokens, num_rows=record.num_rows)
    with pytest.raises(FormatError, match="column attention/3/int8 is of no kind that this version knows"):
        stored_targets(Manifest(store))
