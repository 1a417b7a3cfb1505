"""Student blocks against stored teacher blocks: against both live models, kept, and recomputed when it is stale."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from coldstill.cache.errors import IncompleteError, StoreError
from coldstill.cache.reader import Reader
from coldstill.pipeline.judging.similarity import BlockSimilarity, block_similarity
from coldstill.pipeline.models.forward import block_outputs
from coldstill.pipeline.outputs.run_index import find_run_rows
from coldstill.pipeline.precompute import precompute
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.students.folders import find_student
from coldstill.pipeline.train import train

WriteRecipe = Callable[..., Path]
EXACT: dict[str, Any] = {
    "targets__hidden": {"blocks": [0, 1, 3], "encoding": "float32"},
    "mapping": {"strategy": "pairs", "pairs": {0: 0, 1: 3}},
}


def make(recipe: Recipe) -> dict[int, int]:
    """Run both stages, and give the layer map."""
    precompute(recipe, show_progress=False)
    train(recipe)
    layer_map = json.loads((Path(recipe.output) / "train.json").read_text())["layer_map"]
    return {int(own): other for own, other in layer_map.items()}


def compare(recipe: Recipe, layer_map: dict[int, int]) -> BlockSimilarity:
    return block_similarity(recipe, layer_map, num_rows=2, show_progress=False)


def live_states(folder: Path, recipe: Recipe) -> list[torch.Tensor]:
    """Give every block's output over the first two eval rows, at positions that count but the first."""
    run = find_run_rows(recipe)
    reader = Reader(run.store, run.selections["eval"], ["tokens"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    blocks = model.model.layers
    states: list[list[torch.Tensor]] = [[] for _ in blocks]
    for index in range(2):
        ids = torch.from_numpy(reader.row(index)["tokens"]["ids"].astype("int64"))
        with torch.no_grad(), block_outputs(blocks, range(len(blocks))) as outputs:
            model(input_ids=ids.unsqueeze(0))
        for block, kept in enumerate(states):
            kept.append(outputs[block][0, 1:-1])
    return [torch.cat(kept) for kept in states]


def test_cosines_are_those_of_the_live_models(write_recipe: WriteRecipe):
    recipe = load_recipe(write_recipe(**EXACT))
    found = compare(recipe, make(recipe))
    teacher = live_states(Path(recipe.teacher.path), recipe)
    for matrix, folder in ((found.pruned, find_student(recipe)), (found.recovered, Path(recipe.output) / "student")):
        student = live_states(folder, recipe)
        live = [
            [float(torch.cosine_similarity(own, teacher[other], dim=-1).mean()) for other in found.teacher_blocks]
            for own in student
        ]
        assert torch.allclose(torch.tensor(matrix), torch.tensor(live), atol=1e-4)
    assert found.measure == "cosine"
    assert found.teacher_blocks == [0, 1, 3]
    assert found.num_positions == 2 * 22
    # Where projectors are the identity, nothing changes by them.
    assert [(pair.singular_values, pair.before) for pair in found.pairs] == [(None, pair.after) for pair in found.pairs]


def test_a_narrow_student_is_compared_through_its_projectors(write_recipe: WriteRecipe, workplace: Path):
    recipe = load_recipe(write_recipe(**EXACT, student={"path": str(workplace / "narrow")}))
    found = compare(recipe, make(recipe))
    assert found.measure == "cka"
    student = live_states(Path(recipe.output) / "student", recipe)
    teacher = live_states(Path(recipe.teacher.path), recipe)
    weights = load_file(Path(recipe.output) / "projectors.safetensors")
    for pair in found.pairs:
        weight = weights[f"projectors.{pair.student}.linear.weight"]
        projected = torch.cosine_similarity(student[pair.student] @ weight.T, teacher[pair.teacher], dim=-1).mean()
        assert pair.after == pytest.approx(float(projected), abs=1e-4)
        assert pair.before is None
        assert pair.singular_values == pytest.approx(torch.linalg.svdvals(weight).tolist(), rel=1e-4)
    assert [(pair.student, pair.teacher) for pair in found.pairs] == [(0, 0), (1, 3)]


@pytest.mark.parametrize("is_old", [False, True], ids=["beside the config", "in the config, as they were once"])
def test_kept_channels_say_which_of_the_teachers_channels_a_narrow_student_has(
    is_old: bool, write_recipe: WriteRecipe, workplace: Path
):
    channels = [3, 1, *range(8, 22)]
    config = workplace / "narrow" / "config.json"
    if is_old:
        config.write_text(json.dumps({**json.loads(config.read_text()), "kept_channels": channels}))
    else:
        config.with_name("kept_channels.json").write_text(json.dumps(channels))
    recipe = load_recipe(write_recipe(**EXACT, student={"path": str(workplace / "narrow")}))
    found = compare(recipe, make(recipe))
    student = live_states(Path(recipe.output) / "student", recipe)[1]
    teacher = live_states(Path(recipe.teacher.path), recipe)[3]
    live = float(torch.cosine_similarity(student, teacher[:, channels], dim=-1).mean())
    assert found.measure == "cosine"
    assert found.pairs[1].before == pytest.approx(live, abs=1e-4)
    assert found.recovered[1][found.teacher_blocks.index(3)] == pytest.approx(live, abs=1e-4)


def test_it_is_computed_once_needs_no_teacher_and_outlives_the_store(
    write_recipe: WriteRecipe, workplace: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = load_recipe(write_recipe(targets__hidden={"blocks": [0, 1, 2, 3]}))
    layer_map = make(recipe)
    shutil.rmtree(workplace / "teacher")
    first = compare(recipe, layer_map)
    monkeypatch.setattr("coldstill.pipeline.judging.similarity.load_model", _refuse)
    assert compare(recipe, layer_map) == first
    shutil.rmtree(workplace / "caches")
    assert compare(recipe, layer_map) == first


def test_another_student_or_more_stored_blocks_make_it_stale(write_recipe: WriteRecipe):
    recipe = load_recipe(write_recipe(**EXACT))
    layer_map = make(recipe)
    first = compare(recipe, layer_map)
    precompute(
        load_recipe(write_recipe(targets__hidden={"blocks": [2], "encoding": "float32"}, loss__gamma=0)),
        show_progress=False,
    )
    wider = compare(recipe, layer_map)
    assert wider.teacher_blocks == [0, 1, 2, 3]
    recipe = load_recipe(write_recipe(**EXACT, train__learning_rate=0.01))
    train(recipe, restart=True)
    again = compare(recipe, layer_map)
    assert again.pruned == wider.pruned
    assert again.recovered != wider.recovered
    assert [row[:2] for row in wider.pruned] == [row[:2] for row in first.pruned]
    # Weights count, whatever the record beside them says.
    weights = Path(recipe.output) / "student" / "model.safetensors"
    shutil.copy(find_student(recipe) / weights.name, weights)
    assert compare(recipe, layer_map).recovered == wider.pruned


def test_a_store_without_block_outputs_says_what_to_do(write_recipe: WriteRecipe):
    recipe = load_recipe(write_recipe(targets__hidden={"blocks": "none"}, loss__gamma=0))
    layer_map = make(recipe)
    with pytest.raises(IncompleteError, match=r"no block outputs of the eval rows in int8; name blocks in"):
        compare(recipe, layer_map)


def test_a_store_that_is_gone_before_anything_was_compared_is_an_error(write_recipe: WriteRecipe, workplace: Path):
    recipe = load_recipe(write_recipe())
    layer_map = make(recipe)
    shutil.rmtree(workplace / "caches")
    with pytest.raises(StoreError):
        compare(recipe, layer_map)


def _refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("a model was loaded")
