"""A teacher that streams in block by block says what it says when it is loaded whole, byte for byte."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crash.trees import difference, files_below, lasting_files_below

from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.models.tensor_files import header_of
from coldstill.pipeline.outputs.run_index import rows_key
from coldstill.pipeline.precompute import precompute
from coldstill.pipeline.prune import prune as prune_student
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.runtime.errors import ModelError, NonFiniteError, RecipeError
from coldstill.pipeline.stage_one.computing import StoreWork
from coldstill.pipeline.stage_one.requests import Request, gather
from coldstill.pipeline.stage_one.streamed_shards import shard_computer
from coldstill.pipeline.stage_one.write_behind import WriteBehind
from coldstill.pipeline.sweeps.keys import sweep_key
from coldstill.pipeline.train import train

# The architectures that the README names, and what their tiny configs need.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
    "phi3": {},
    "olmo": {},
    "olmo2": {},
    # Its files have a tensor for each expert, which transformers joins.
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
ALL_KINDS = {
    "logits": {"kind": "topk_sampled", "k": 12, "samples": 5, "temperatures": [1, 2]},
    "hidden": {"blocks": [0, 3], "inputs": [0, 2], "encoding": "coded", "token_fraction": 0.5},
}


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coldstill.cache.laying.SHARD_TOKENS", 96)


@pytest.fixture
def placed(write_recipe: Callable[..., Path], workplace: Path) -> Callable[..., Recipe]:
    """Make a recipe of a placement, with a cache and output of its own."""

    def recipe(placement: str, **changes: Any) -> Recipe:
        places = {"output": str(workplace / placement / "run"), "cache": str(workplace / placement / "caches")}
        # Two batches a shard, so that their order counts.
        keys = {"teacher__placement": placement, "teacher__batch_size": 2, **places, **changes}
        return load_recipe(write_recipe(**keys))

    return recipe


def stored(recipe: Recipe) -> dict[str, bytes]:
    precompute(recipe, show_progress=False)
    return files_below(Path(recipe.cache) / "stores")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_streamed_teacher_writes_the_same_store(
    placed: Callable[..., Recipe],
    build_model: Any,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
):
    monkeypatch.setattr("coldstill.cache.laying.SHARD_TOKENS", 160)  # two batches a shard, of rows as long as these
    build_model(architecture, **ARCHITECTURES[architecture]).save_pretrained(workplace / "teacher")
    # Documents of several lengths, so that batches are padded.
    changes = {"targets": ALL_KINDS, "loss__gamma": 0.0, "data__packing": False, "data__sequence_length": 40}
    changes["data__train__max_rows"] = 9
    whole, streamed = (stored(placed(placement, **changes)) for placement in ("whole", "streamed"))
    assert len([name for name in whole if name.endswith("zarr.json")]) > 20
    assert difference(streamed, whole) == {}


def test_a_streamed_teacher_in_half_precision_writes_the_same_store(placed: Callable[..., Recipe]):
    # Where its blocks are fitted in float32, for a CPU that is slow in bfloat16, they are so one by one.
    changes = {"targets": ALL_KINDS, "loss__gamma": 0.0, "teacher__dtype": "bfloat16"}
    whole, streamed = (stored(placed(placement, **changes)) for placement in ("whole", "streamed"))
    assert difference(streamed, whole) == {}


def test_shards_that_are_computed_together_have_the_bytes_of_each_alone(placed: Callable[..., Recipe]):
    changes = {"targets": ALL_KINDS, "loss__gamma": 0.0}
    whole, streamed = placed("whole", **changes), placed("streamed", **changes)
    precompute(whole, show_progress=False)
    teacher, gathered = gather([streamed])
    work = StoreWork(streamed.cache, teacher)
    demands = work.register([Request(item, [0, 3]) for item in gathered])
    work.calibrate(demands, show_progress=False)
    jobs = work.missing(demands)
    assert len(jobs) == 7
    computer = shard_computer(work.store, work.manifest, teacher, row_names=lambda _row_ids: {})
    done: list[float] = []
    with WriteBehind(work.store, work.manifest, lambda _bytes: None) as writer:
        computer.run(jobs, writer, done.append)
    assert sum(done) == pytest.approx(sum(job.num_tokens for job in jobs))
    assert not work.missing(demands)
    arrays = [files_below(Path(recipe.cache) / "stores") for recipe in (streamed, whole)]
    got, want = ({name: of[name] for name in of if "/shards/" in name} for of in arrays)
    assert difference(got, want) == {}


def test_a_column_of_an_early_block_costs_no_later_block_and_no_head(placed: Callable[..., Recipe]):
    nothing = {"logits": {"kind": "none"}, "hidden": {"blocks": [1]}}
    recipe = placed("streamed", targets=nothing, loss__gamma=0.0, loss__beta=0.0)
    teacher, gathered = gather([recipe])
    work = StoreWork(recipe.cache, teacher)
    demands = work.register([Request(item, [1]) for item in gathered])
    of_train = set(demands[0].selections["train"].shard_names)
    jobs = [job for job in work.missing(demands) if job.shard in of_train]  # eval keeps last states
    ran: list[int] = []
    for index, block in enumerate(teacher.parts.blocks):
        block.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    computer = shard_computer(work.store, work.manifest, teacher, row_names=lambda _row_ids: {})
    done: list[float] = []
    with WriteBehind(work.store, work.manifest, lambda _bytes: None) as writer:
        computer.run(jobs, writer, done.append)
    assert set(ran) == {0, 1}
    assert sum(done) == pytest.approx(sum(job.num_tokens for job in jobs))
    assert not {job.shard for job in work.missing(demands)} & of_train


def test_a_value_that_is_not_finite_is_named_with_its_row_and_block(
    placed: Callable[..., Recipe], build_model: Any, workplace: Path
):
    model = build_model()
    for projection in ("gate_proj", "up_proj"):
        getattr(model.model.layers[2].mlp, projection).weight.data.mul_(1e25)
    model.save_pretrained(workplace / "teacher")
    changes = {"targets__hidden": {"blocks": [2, 3], "encoding": "float32"}, "mapping__strategy": "uniform"}
    recipe = placed("streamed", student={"path": str(workplace / "narrow")}, loss__gamma=0.0, **changes)
    line = r"teacher gave a non-finite value: (train|eval) row \d+, block 2, position \d+; dtype float32"
    with pytest.raises(NonFiniteError, match=line):
        precompute(recipe, show_progress=False)


@pytest.mark.parametrize(
    "prune",
    [
        {"layers": {"remove": 1, "method": "importance"}, "reconstruct": "blocks"},
        {"layers": {"method": "explicit", "blocks": [0, 2]}, "reconstruct": "linear"},
        {"layers": {"remove": 1, "method": "first"}, "mlp": {"keep": 0.5}, "reconstruct": False},
        {"heads": {"keep": 0.5}, "hidden": {"size": 24}, "reconstruct": "linear"},
    ],
    ids=["importance", "explicit", "depth and width", "heads and stream"],
)
def test_a_student_that_is_cut_of_a_streamed_teacher_is_the_same(placed: Callable[..., Recipe], prune: dict[str, Any]):
    students = {"prune": {**prune, "calibration_rows": 6}}
    folders = []
    for placement in ("whole", "streamed"):
        folder = prune_student(placed(placement, student=students)).folder
        files = lasting_files_below(folder)
        for name in ("recipe.yaml", "provenance.json"):  # have the recipe's own places
            del files[name]
        folders.append(files)
    assert "model.safetensors" in folders[0]
    assert difference(folders[1], folders[0]) == {}


@pytest.mark.parametrize(
    ("student", "line"),
    [
        ({"prune": {"layers": {"remove": 1, "method": "kl"}}}, "student.prune.layers.method kl runs blocks thousands"),
        ({"init": {"compression": 0.5, "weights": "interpolate"}}, "student.init.weights interpolate reads all blocks"),
    ],
    ids=["kl", "interpolate"],
)
def test_a_cut_that_cannot_stream_is_one_line_and_loads_nothing(
    placed: Callable[..., Recipe], student: dict[str, Any], line: str
):
    recipe = placed("streamed", student=student, mapping__strategy="uniform")
    with pytest.raises(RecipeError, match=line) as raised:
        prune_student(recipe)
    assert len(str(raised.value).splitlines()) == 1
    assert not list(Path(recipe.cache).glob("students/*"))


def without_a_file(teacher: Path) -> None:
    (teacher / "model.safetensors").rename(teacher / "model-00001-of-00002.safetensors")
    files = {name: f"model-0000{place}-of-00002.safetensors" for place, name in ((1, "model.norm"), (2, "lm_head"))}
    (teacher / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def larger_than_any_memory(teacher: Path) -> None:
    _, entries = header_of(teacher / "model.safetensors")
    header, end = {}, 0
    for name, dtype, shape, *_ in entries:
        size = (1 << 45) if ".layers." in name else torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": [size], "data_offsets": [end, end + 4 * size]}
        end += 4 * size
    text = json.dumps(header).encode()
    (teacher / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


@pytest.mark.parametrize(
    ("placement", "change", "line"),
    [
        ("streamed", without_a_file, r"index\.json names model-00002-of-00002\.safetensors, and .* has no such file"),
        ("whole", without_a_file, r"index\.json names model-00002-of-00002\.safetensors, and .* has no such file"),
        ("streamed", larger_than_any_memory, "placement is streamed, and cpu has .* too little for two of the teach"),
        ("auto", larger_than_any_memory, "placement is auto, and cpu has .* too little for two of the teacher's blo"),
    ],
    ids=["missing file", "missing file, whole", "no memory", "no memory, auto"],
)
def test_a_placement_that_cannot_be_is_one_line_and_nothing_is_made(
    placed: Callable[..., Recipe], workplace: Path, placement: str, change: Callable[[Path], None], line: str
):
    change(workplace / "teacher")
    with pytest.raises((RecipeError, ModelError), match=line) as raised:
        precompute(placed(placement, teacher__device="cpu"), show_progress=False)
    assert len(str(raised.value).splitlines()) == 1
    assert not (workplace / placement).exists()


def test_a_teacher_beside_the_student_is_not_streamed(placed: Callable[..., Recipe]):
    recipe = placed("streamed", targets={"source": "live"})
    with pytest.raises(RecipeError, match=r"targets.source is live.* would read its .* of weights for each of them"):
        train(recipe)


def test_the_placement_names_no_store_no_student_and_no_run(placed: Callable[..., Recipe]):
    keys = []
    for placement in ("whole", "streamed", "spread"):
        recipe = placed(placement)
        keys.append((sweep_key(recipe), rows_key(recipe), Teacher.locate(recipe.teacher).fingerprint))
    assert keys[0] == keys[1] == keys[2]
