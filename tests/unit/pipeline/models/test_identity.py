"""Which model it is: what changes its name, what does not, and files that are no safetensors."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from coldstill.cache.identity import fingerprint
from coldstill.pipeline.models.identity import teacher_identity, weights_digest
from coldstill.pipeline.runtime.errors import ModelError

CONFIG = {"hidden_size": 64, "num_hidden_layers": 4, "rope": {"theta": 1e4}}
TENSORS = {
    "embed": np.arange(12, dtype=np.float32).reshape(3, 4),
    "head": np.arange(8, dtype=np.float16),
    "norm": np.ones(4, dtype=np.float32),
}


def name_of(config: dict = CONFIG, weights: str = "w", dtype: str = "float32") -> str:
    return fingerprint(teacher_identity(config=config, weights=weights, dtype=dtype))


@dataclass(frozen=True)
class Difference:
    id: str
    arguments: dict


@pytest.mark.parametrize(
    "difference",
    [
        Difference("a config value", {"config": CONFIG | {"hidden_size": 65}}),
        Difference("a nested config value", {"config": CONFIG | {"rope": {"theta": 1e5}}}),
        Difference("a config key", {"config": CONFIG | {"tie_word_embeddings": True}}),
        Difference("weights", {"weights": "v"}),
        Difference("dtype", {"dtype": "bfloat16"}),
    ],
    ids=lambda difference: difference.id,
)
def test_what_changes_the_teachers_numbers_changes_its_fingerprint(difference: Difference):
    assert name_of(**difference.arguments) != name_of()


@pytest.mark.parametrize("key", ["_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"])
def test_a_volatile_config_key_leaves_the_fingerprint(key: str):
    assert name_of(config=CONFIG | {key: "anything"}) == name_of()


def test_the_order_of_config_keys_leaves_the_fingerprint():
    assert name_of(config=dict(reversed(CONFIG.items()))) == name_of()


def test_a_teachers_name_stays_what_its_store_on_disk_is_called():
    assert name_of() == "7c65742caf1c7bb6"


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_config_with_a_number_that_json_has_not_has_a_name_of_its_own(value: float):
    names = {name_of()}
    names.add(name_of(CONFIG | {"time_step_limit": [0.0, value]}))
    names.add(name_of(CONFIG | {"time_step_limit": [0.0, 1.0]}))
    names.add(name_of(CONFIG | {"rope": {"theta": value}}))
    assert len(names) == 4
    assert name_of(CONFIG | {"limit": (0.0, value)}) == name_of(CONFIG | {"limit": [0.0, value]})


def test_weights_split_over_two_files_in_another_order_are_the_same_weights(tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    save_file(TENSORS, tmp_path / "one/model.safetensors", metadata={"format": "pt"})
    save_file({"norm": TENSORS["norm"], "embed": TENSORS["embed"]}, tmp_path / "two/model-00001-of-00002.safetensors")
    save_file({"head": TENSORS["head"]}, tmp_path / "two/model-00002-of-00002.safetensors")
    assert weights_digest(tmp_path / "one") == weights_digest(tmp_path / "two")


def test_one_flipped_weight_byte_changes_the_digest(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    data = file.read_bytes()
    digests = {weights_digest(tmp_path)}
    num_weight_bytes = sum(tensor.nbytes for tensor in TENSORS.values())
    for position in range(len(data) - num_weight_bytes, len(data)):
        file.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        digests.add(weights_digest(tmp_path))
    assert len(digests) == num_weight_bytes + 1


@pytest.mark.parametrize(
    "tensors",
    [
        {**TENSORS, "norm": TENSORS["norm"].reshape(2, 2)},
        {**TENSORS, "norm": TENSORS["norm"].view(np.int32)},
        {"embed": TENSORS["embed"], "head": TENSORS["head"], "normal": TENSORS["norm"]},
        {"embed": TENSORS["embed"], "head": TENSORS["head"]},
    ],
    ids=["shape", "dtype", "name", "one tensor less"],
)
def test_other_tensors_of_the_same_bytes_have_another_digest(tmp_path: Path, tensors: dict):
    save_file(TENSORS, tmp_path / "model.safetensors")
    first = weights_digest(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    assert weights_digest(tmp_path) != first


def test_a_folder_without_safetensors_is_refused_by_name(tmp_path: Path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=r"no \*\.safetensors file in .*; Coldstill reads safetensors only") as caught:
        weights_digest(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_truncated_file_is_refused_wherever_it_was_cut(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    data = file.read_bytes()
    for length in range(len(data)):
        file.write_bytes(data[:length])
        with pytest.raises(ModelError, match=r"cut short|not a safetensors file") as caught:
            weights_digest(tmp_path)
        assert str(file) in str(caught.value)


def test_a_truncated_file_says_how_many_bytes_are_missing(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ModelError, match="is cut short: 3 bytes are missing; download or save it again"):
        weights_digest(tmp_path)


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>404 not found</html>", b"\xff" * 64, struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc", bytes(64)],
    ids=["empty", "html", "huge header", "no text", "zeros"],
)
def test_garbage_is_refused_by_name(tmp_path: Path, data: bytes):
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    with pytest.raises(ModelError, match="is not a safetensors file") as caught:
        weights_digest(tmp_path)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    "header",
    [[], 5, {"a": {}}, {"a": [1]}, *({"a": {"dtype": "F32", "shape": [], "data_offsets": offsets}}
     for offsets in ([5, 0], [-5000, 0], ["x", 1], [1]))],
)  # fmt: skip
def test_a_header_of_another_shape_is_no_safetensors_file(tmp_path, header):
    encoded = json.dumps(header).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + b"123456")
    with pytest.raises(ModelError, match=r"m.safetensors is not a safetensors file: "):
        weights_digest(tmp_path)
