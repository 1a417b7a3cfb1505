"""Teachers whose weights are quantised, as transformers loads them: whole, by content, or refused in one line."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crash.trees import difference, files_below
from safetensors.torch import load_file, save_file
from torch import Tensor

from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.plan import plan
from coldstill.pipeline.precompute import precompute
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.recipe.sections import Recipe, TeacherConfig
from coldstill.pipeline.runtime.errors import ModelError, RecipeError

FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "format": "int-quantized",
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
        }
    },
}
# What cannot be loaded without a library, and the library.
NEEDING = {
    "bitsandbytes": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes"),
    "compressed-tensors": (INT8, "compressed_tensors"),
    "gptq": ({"bits": 4, "group_size": 128, "desc_act": False, "sym": True}, "optimum"),
    "awq": ({"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}, "gptqmodel"),
}
needs_no_accelerator = pytest.mark.skipif(
    torch.accelerator.is_available(), reason="transformers opens weights of eight bits where there is no accelerator"
)


def to_fp8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    rows, columns = weight.shape
    tiles = weight.reshape(rows // 16, 16, columns // 16, 16)
    scale = tiles.abs().amax(dim=(1, 3), keepdim=True) / 448
    rounded = (tiles / scale).to(torch.float8_e4m3fn)
    opened = (rounded.float() * scale).reshape(rows, columns)
    return {"weight": rounded.reshape(rows, columns), "weight_scale_inv": scale.reshape(rows // 16, -1)}, opened


def to_int8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    rounded = (weight / scale).round().to(torch.int8)
    return {"weight": rounded, "weight_scale": scale}, rounded.float() * scale


def with_config(teacher: Path, section: dict[str, Any]) -> None:
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "quantization_config": section}))


@pytest.fixture
def quantise(workplace: Path) -> Callable[..., None]:
    """Quantise the teacher in its place; its numbers are those of the one that is given, which stays as it is."""

    def write(section: dict[str, Any], how: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]) -> None:
        file = workplace / "teacher/model.safetensors"
        plain, quantised = load_file(file), {}
        for name, weight in list(plain.items()):
            if not name.endswith("_proj.weight"):
                quantised[name] = weight
                continue
            tensors, plain[name] = how(weight)
            quantised |= {f"{name.removesuffix('weight')}{part}": value for part, value in tensors.items()}
        (workplace / "opened").mkdir()
        for there in (workplace / "teacher").iterdir():
            (workplace / "opened" / there.name).write_bytes(there.read_bytes())
        save_file(plain, workplace / "opened/model.safetensors", {"format": "pt"})
        save_file(quantised, file, {"format": "pt"})
        with_config(workplace / "teacher", section)

    return write


@pytest.fixture
def recipe_of(write_recipe: Callable[..., Path], workplace: Path) -> Callable[..., Recipe]:
    """Make a recipe of the teacher in a folder, with a student that is there already."""

    def recipe(folder: str = "teacher", **changes: Any) -> Recipe:
        places = {"output": str(workplace / f"run-{folder}"), "cache": str(workplace / f"caches-{folder}")}
        targets = {"logits": {"kind": "final", "encoding": "float32"}, "hidden": {"blocks": [1, 3]}}
        given = {"teacher__path": str(workplace / folder), "student": {"path": str(workplace / "narrow")}}
        keys = {
            **places,
            **given,
            "targets": targets,
            "loss__gamma": 0.0,
            "mapping__strategy": "uniform",
            "teacher__device": "cpu",
        }
        return load_recipe(write_recipe(**{**keys, **changes}))

    return recipe


def shards_of(recipe: Recipe) -> dict[str, bytes]:
    (store,) = (Path(recipe.cache) / "stores").iterdir()
    return {name: content for name, content in files_below(store).items() if name.startswith("arrays.zarr/shards/")}


@pytest.mark.parametrize(
    ("section", "how", "library"),
    [
        pytest.param(FP8, to_fp8, None, marks=needs_no_accelerator, id="fp8"),
        pytest.param(INT8, to_int8, "compressed_tensors", id="compressed-tensors"),
    ],
)
def test_a_quantised_teacher_says_what_its_opened_weights_say(
    recipe_of: Callable[..., Recipe],
    quantise: Callable[..., None],
    section: dict[str, Any],
    how: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]],
    library: str | None,
):
    if library is not None:
        pytest.importorskip(library, reason=f"{library} is not installed, which transformers needs for such weights")
    quantise(section, how)
    recipes = [recipe_of(folder) for folder in ("teacher", "opened")]
    for recipe in recipes:
        assert precompute(recipe, show_progress=False).computed_tokens > 0
    quantised, opened = map(shards_of, recipes)
    assert len(quantised) > 20
    assert difference(quantised, opened) == {}
    # They are two teachers all the same, and found again by their content.
    identities = [Teacher.locate(recipe.teacher).identity for recipe in recipes]
    assert all(identities[0][part] != identities[1][part] for part in ("config", "weights"))
    assert precompute(recipes[0], show_progress=False).computed_tokens == 0
    weights = sum(value.numel() for value in load_file(Path(recipes[1].teacher.path) / "model.safetensors").values())
    assert plan(recipes[0], show_progress=False).teacher.weight_bytes == 4 * weights


def test_how_weights_are_quantised_is_part_of_which_teacher_it_is(workplace: Path):
    found = set()
    for section in (None, FP8, {**FP8, "weight_block_size": [32, 16]}, INT8):
        if section is not None:
            with_config(workplace / "teacher", section)
        found.add(Teacher.locate(TeacherConfig(path=str(workplace / "teacher"))).fingerprint)
    assert len(found) == 4


@pytest.mark.parametrize("method", NEEDING)
def test_a_library_that_is_missing_is_one_line_and_nothing_is_made(
    recipe_of: Callable[..., Recipe], workplace: Path, method: str
):
    section, library = NEEDING[method]
    if importlib.util.find_spec(library) is not None:
        pytest.skip(f"{library} is installed, without which this is tested")
    with_config(workplace / "teacher", {**section, "quant_method": method})
    recipe = recipe_of()
    line = rf"has weights quantised by {method}, which transformers cannot load here: .*{library.replace('_', '.')}"
    with pytest.raises(ModelError, match=line) as raised:
        precompute(recipe, show_progress=False)
    assert len(str(raised.value).splitlines()) == 1
    assert not Path(recipe.cache).exists()
    assert not Path(recipe.output).exists()


@pytest.mark.parametrize(
    ("section", "changes", "line"),
    [
        (
            {"quant_method": "squeezed"},
            {},
            "quantised by squeezed, which transformers cannot load here: Unknown",
        ),
        (FP8, {"teacher__placement": "streamed"}, "streamed, but the teacher's weights are quantised by fp8, and only"),
        (FP8, {"student": {"prune": {"layers": {"remove": 1}}}}, "student.prune makes the student of the teacher's we"),
        (FP8, {"student": {"init": {"compression": 0.5}}}, "student.init makes the student of the teacher's weights"),
        (FP8, {"student": {"path": "teacher"}}, "student.path .* has weights quantised by fp8, which training cannot"),
    ],
    ids=["unknown", "streamed", "prune", "init", "student"],
)
def test_what_cannot_be_done_with_quantised_weights_is_one_line(
    recipe_of: Callable[..., Recipe], workplace: Path, section: dict[str, Any], changes: dict[str, Any], line: str
):
    with_config(workplace / "teacher", section)
    if "path" in changes.get("student", {}):
        paths = {"student": {"path": str(workplace / "teacher")}, "teacher__path": str(workplace / "narrow")}
        changes = {**paths, "targets": {"hidden": {"blocks": "none"}}}
    recipe = recipe_of(**changes)
    with pytest.raises((ModelError, RecipeError), match=line) as raised:
        precompute(recipe, show_progress=False)
    assert len(str(raised.value).splitlines()) == 1
    assert not Path(recipe.cache).exists()
