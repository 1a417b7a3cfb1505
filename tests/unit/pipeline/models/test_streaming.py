"""A model whose blocks stream in is the model, in the memory of two blocks; wrong files are one line."""

import ctypes
import gc
import json
import re
import shutil
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from coldstill.pipeline.models import load_model, rope_switches, take_apart
from coldstill.pipeline.models.block_weights import BlockWeights
from coldstill.pipeline.models.forward import InputOf, model_inputs, pad_rows, run_body
from coldstill.pipeline.models.passage import Passage
from coldstill.pipeline.models.streaming import load_streamed
from coldstill.pipeline.runtime.errors import ModelError

CPU = torch.device("cpu")
BLOCK = "model.layers.1.mlp.up_proj.weight"
LONGROPE = {
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 16,
    },
}


def rows_of(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 380, (length,), generator=generator) for length in lengths]


def inputs_of(*lengths: int) -> tuple[dict[str, Any], Tensor]:
    ids_BT, mask_BT = pad_rows(rows_of(*lengths))
    return model_inputs(ids_BT, None if bool(mask_BT.all()) else mask_BT.long()), mask_BT


@pytest.fixture
def changed(model_folders: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Copy the teacher; `change` gets its tensors, and leaves them as they are to be."""

    def copy(change: Callable[[dict[str, Tensor]], None] = lambda _: None, **config: Any) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(model_folders["teacher"], folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(written | config))
        return folder

    return copy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_streamed_model_runs_like_any_other(model_folders: dict[str, Path], dtype: str):
    folder = model_folders["teacher"]
    streamed = load_streamed(folder, dtype=dtype, device=CPU).model
    whole = load_model(folder, dtype=dtype)
    inputs, mask_BT = inputs_of(9, 24, 1)
    with torch.inference_mode():
        got, want = streamed(**inputs).logits, whole(**inputs).logits
    assert torch.equal(got[mask_BT], want[mask_BT])


@pytest.mark.parametrize(("architecture", "changes"), [("llama", {}), ("phi3", LONGROPE)], ids=["llama", "longrope"])
def test_batches_that_pass_the_blocks_together_give_every_stream_of_each_alone(
    build_model: Callable[..., Any], tmp_path: Path, architecture: str, changes: dict[str, Any]
):
    build_model(architecture, **changes).save_pretrained(tmp_path)
    streamed = load_streamed(tmp_path, dtype="float32", device=CPU)
    whole = take_apart(load_model(tmp_path, dtype="float32"))
    switches = rope_switches(whole.model.config)
    batches = [inputs_of(*lengths) for lengths in ((24, 24), (9, 24, 1, 17))]
    passages = [Passage(streamed, inputs, switches) for inputs, _ in batches]
    got: list[dict[Any, Tensor]] = [{} for _ in batches]
    for index in range(4):
        for passage, streams in zip(passages, got, strict=True):
            streams |= passage.step(index, wait_at=CPU)
        # What the blocks behind it are called with was found without their weights.
        at_work = [number for number, block in enumerate(streamed.blocks) if not next(block.parameters()).is_meta]
        assert at_work == [index]
    wanted = [*range(4), *map(InputOf, range(4))]
    for (inputs, mask_BT), passage, streams in zip(batches, passages, got, strict=True):
        with torch.inference_mode():
            expected, state_BTD = run_body(whole.body, whole.blocks, inputs, wanted, switches=switches)
        for place in wanted:
            assert torch.equal(streams[place][mask_BT], expected[place][mask_BT]), place
        assert torch.equal(passage.last_state()[mask_BT], state_BTD[mask_BT])


def test_experts_that_files_have_one_by_one_are_joined(build_model: Callable[..., Any], tmp_path: Path):
    build_model("mixtral", num_local_experts=12, num_experts_per_tok=2).save_pretrained(tmp_path)
    assert any("experts.11." in name for name in load_file(tmp_path / "model.safetensors"))
    inputs, _ = inputs_of(24, 24)
    with torch.inference_mode():
        got = load_streamed(tmp_path, dtype="float32", device=CPU).model(**inputs).logits
        assert torch.equal(got, load_model(tmp_path, dtype="float32")(**inputs).logits)


class Watched:
    """Blocks of one number each, and how many of them are in memory whenever another is read."""

    def __init__(self, count: int) -> None:
        with torch.device("meta"):
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(1, 1, bias=False) for _ in range(count)])
        self.alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.most = 0
        self.read: SimpleQueue[int] = SimpleQueue()
        self.threads: set[str] = set()

    def __call__(self, index: int) -> Mapping[str, Tensor]:
        weight = torch.full((1, 1), float(index))
        self.alive.add(weight)
        at_work = [block.weight for block in self.blocks if not block.weight.is_meta]
        self.most = max(self.most, len({value.data_ptr() for value in (*self.alive, *at_work)}))
        self.threads.add(threading.current_thread().name.partition("_")[0])
        self.read.put(index)
        return {"weight": weight}


def test_two_blocks_at_most_are_in_memory_and_the_next_is_read_while_one_works():
    watched = Watched(5)
    weights = BlockWeights(watched.blocks, watched)
    weights.bring(0)
    assert watched.read.get(timeout=60) == 0
    for _ in range(2):
        for index, block in enumerate(watched.blocks):
            for _ in range(3):
                assert block(torch.ones(1, 1)).item() == index
            assert watched.read.get(timeout=60) == (index + 1) % 5
            assert not block.weight.is_meta
            assert sum(not other.weight.is_meta for other in watched.blocks) == 1
    assert watched.read.empty()
    assert watched.most == 2
    assert watched.threads == {"coldstill-weights"}


def test_blocks_at_rest_take_no_memory_until_one_is_called():
    watched = Watched(3)
    weights = BlockWeights(watched.blocks, watched)
    watched.blocks[1](torch.ones(1, 1))
    weights.rest()
    assert all(block.weight.is_meta for block in watched.blocks)
    assert not len(watched.alive)
    assert watched.blocks[2](torch.ones(1, 1)).item() == 2


def test_a_block_that_is_let_go_takes_nothing_with_it_that_was_read_ahead():
    watched = Watched(3)
    weights = BlockWeights(watched.blocks, watched)
    watched.blocks[0](torch.ones(1, 1))
    weights.drop()
    assert all(block.weight.is_meta for block in watched.blocks)
    assert watched.blocks[1](torch.ones(1, 1)).item() == 1
    assert [watched.read.get(timeout=60) for _ in range(3)] == [0, 1, 2]
    assert watched.read.empty()


def test_a_block_that_is_called_out_of_order_has_its_own_weights():
    watched = Watched(5)
    BlockWeights(watched.blocks, watched)
    for index in (3, 0, 4, 4, 1):
        assert watched.blocks[index](torch.ones(1, 1)).item() == index
    assert watched.most <= 2


def test_what_goes_wrong_in_the_thread_is_said_where_the_block_is_called():
    watched = Watched(3)

    def read(index: int) -> Mapping[str, Tensor]:
        if index == 1:
            raise ModelError("the file is cut short")
        return watched(index)

    BlockWeights(watched.blocks, read)
    watched.blocks[0](torch.ones(1, 1))
    with pytest.raises(ModelError, match="the file is cut short"):
        watched.blocks[1](torch.ones(1, 1))


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def with_value(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "config"),
    [
        (without(BLOCK), {}),
        (without("model.norm.weight"), {}),
        (with_value(BLOCK, torch.ones(3, 3)), {}),
        (with_value(BLOCK, torch.full((48, 32), torch.nan)), {}),
        (with_value("model.norm.weight", torch.full((32,), torch.inf)), {}),
        (with_value("model.layers.1.mlp.up_proj.bias", torch.ones(48)), {}),
        (lambda _: None, {"num_hidden_layers": 3}),
        (lambda _: None, {"tie_word_embeddings": True}),
    ],
    ids=["no weight of a block", "no norm", "shape", "NaN in a block", "inf", "bias", "more blocks", "tied"],
)
def test_files_that_hold_no_whole_model_are_refused_in_the_same_words(
    changed: Callable[..., Path], change: Callable[[dict[str, Tensor]], None], config: dict[str, Any]
):
    folder = changed(change, **config)
    with pytest.raises(ModelError) as whole:
        load_model(folder, dtype="float32")
    with pytest.raises(ModelError) as streamed:
        load_streamed(folder, dtype="float32", device=CPU)
    assert str(streamed.value) == str(whole.value)
    assert len(str(whole.value).splitlines()) == 1


def test_an_index_that_names_a_missing_file_is_refused_by_name(changed: Callable[..., Path]):
    folder = changed()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    line = r"model\.safetensors\.index\.json names model-00002-of-00002\.safetensors, and .* has no such file: "
    with pytest.raises(ModelError, match=line):
        load_streamed(folder, dtype="float32", device=CPU)


def test_a_file_that_is_cut_short_is_refused(changed: Callable[..., Path]):
    folder = changed()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=f"{re.escape(str(file))} is cut short: 100 bytes are missing"):
        load_streamed(folder, dtype="float32", device=CPU)


def test_a_model_whose_blocks_share_more_than_a_stream_is_refused(build_model: Callable[..., Any], tmp_path: Path):
    small = {"vocab_size_per_layer_input": 384, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    build_model("gemma3n_text", head_dim=8, num_kv_shared_layers=0, **small).save_pretrained(tmp_path)
    line = "cannot be streamed, block by block: its blocks hand on 4 streams, and not one; use teacher.placement whole"
    with pytest.raises(ModelError, match=line):
        load_streamed(tmp_path, dtype="float32", device=CPU)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much memory a process held since a moment")
def test_a_process_holds_a_few_blocks_memory_where_many_pass(build_model: Callable[..., Any], tmp_path: Path):
    model = build_model(hidden_size=128, intermediate_size=4096, num_hidden_layers=16)
    model.save_pretrained(tmp_path)
    block_bytes = sum(value.nbytes for value in model.model.layers[0].state_dict().values())
    del model
    batches = [inputs_of(24, 24), inputs_of(24, 24)]
    before = held_bytes(since_now=True)
    streamed = load_streamed(tmp_path, dtype="float32", device=CPU)
    for _ in range(2):
        passages = [Passage(streamed, inputs, []) for inputs, _ in batches]
        for index in range(16):
            for passage in passages:
                passage.step(index, wait_at=CPU)
        for passage in passages:
            passage.last_state()
    # Of 104 MB; two blocks, what the first run of anything takes, and what malloc has between them.
    assert 2 * block_bytes < held_bytes() - before < 8 * block_bytes


def held_bytes(*, since_now: bool = False) -> int:
    """Return the most memory that this process has held, since now or since it was last asked so."""
    if since_now:
        gc.collect()
        # What was given back to malloc would be taken again without a trace.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024
