"""Where a teacher's weights are to lie is decided by their bytes, before they are read; what cannot be is one line."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from coldstill.pipeline.models.placement import WeightBytes
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.recipe.sections import TeacherConfig
from coldstill.pipeline.runtime.errors import ModelError, RecipeError


@pytest.fixture
def sized(model_folders: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A teacher whose files say that its tensors have so many numbers, and have none of them."""

    def write(*, block: int, others: int, **config: Any) -> Path:
        folder = tmp_path / "sized"
        shutil.copytree(model_folders["teacher"], folder)
        sizes = {"model.embed_tokens.weight": others}
        for index in range(4):
            sizes[f"model.layers.{index}.mlp.up_proj.weight"] = block
        header, end = {}, 0
        for name, size in sizes.items():
            header[name] = {"dtype": "BF16", "shape": [size], "data_offsets": [end, end + 2 * size]}
            end += 2 * size
        text = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(written | config))
        return folder

    return write


def located(folder: Path, **keys: Any) -> Teacher:
    return Teacher.locate(TeacherConfig(path=str(folder), device="cpu", **keys))


def test_bytes_are_those_of_the_dtype_that_the_teacher_runs_in(sized: Callable[..., Path]):
    teacher = located(sized(block=1000, others=300), dtype="float32")
    assert teacher.weights == WeightBytes(total=17_200, largest_block=4000, others=1200, num_blocks=4)
    assert teacher.weights.streamed == 9200


def test_auto_streams_what_does_not_fit_into_memory(sized: Callable[..., Path], model_folders: dict[str, Path]):
    assert located(model_folders["teacher"]).placement == "whole"
    assert located(sized(block=1 << 45, others=1000)).placement == "streamed"


def test_no_memory_for_two_blocks_is_one_line(sized: Callable[..., Path]):
    teacher = located(sized(block=1 << 45, others=1 << 30), dtype="bfloat16")
    with pytest.raises(RecipeError) as raised:
        teacher.check_placement()
    line = str(raised.value)
    assert line.startswith("teacher.placement is auto, and cpu has ")
    assert (
        "too little for two of the teacher's blocks (70.4 TB each) beside its embedding and output head (2.1 GB)"
        in line
    )
    assert len(line.splitlines()) == 1


@pytest.mark.skipif(torch.accelerator.is_available(), reason="made for a machine without an accelerator")
def test_spreading_over_devices_that_are_not_there_is_one_line(model_folders: dict[str, Path]):
    with pytest.raises(RecipeError, match="placement is spread, over several accelerators, and this machine has no"):
        located(model_folders["teacher"], placement="spread").check_placement()


FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="made for a machine without an accelerator")
def test_quantised_weights_are_loaded_whole_and_never_streamed(sized: Callable[..., Path]):
    folder = sized(block=1000, others=1000, quantization_config=FP8, intermediate_size=1 << 40)
    teacher = located(folder)
    assert teacher.placement == "whole"
    # Without kernels for eight bits transformers opens them while it loads.
    assert teacher.weights.total > 4 * 3 * (1 << 40) * 32 * 4
    with pytest.raises(RecipeError, match="streamed, but the teacher's weights are quantised by fp8, and only transfo"):
        located(folder, placement="streamed").check_placement()


def test_weights_that_stay_as_they_are_take_what_their_files_do(sized: Callable[..., Path]):
    teacher = located(sized(block=1000, others=300))
    assert WeightBytes.of(teacher.folder, teacher.config, dtype=None).total == 2 * 4300


def test_a_missing_file_is_named_before_anything_is_loaded(model_folders: dict[str, Path], tmp_path: Path):
    folder = tmp_path / "cut"
    shutil.copytree(model_folders["teacher"], folder)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00007-of-00007.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"names model-00007-of-00007\.safetensors, and .* has no such file"):
        located(folder).check_placement()
