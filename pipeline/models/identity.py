"""Which model it is: by the content of its config and of its safetensors files, never by its path or its date."""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from transformers import PreTrainedConfig

from coldstill.cache.identity import digest_of
from coldstill.pipeline.models.tensor_files import cut_short, header_of
from coldstill.pipeline.runtime.errors import ModelError

# Fields of a model's config that say nothing about what it computes.
_VOLATILE_CONFIG_KEYS = frozenset(
    {"_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}
)
_HASH_BLOCK_BYTES = 1 << 22


def identify(folder: Path, config: PreTrainedConfig, *, dtype: str) -> dict[str, str]:
    """Say which model a folder holds, by content: its config, its weights and the dtype that it is to run in."""
    return teacher_identity(config=config.to_dict(), weights=weights_digest(folder), dtype=dtype)


def teacher_identity(*, config: Mapping[str, Any], weights: str, dtype: str) -> dict[str, str]:
    """Say which teacher: digests of its config and weights, and the dtype that it computes in.

    Args:
        config: The model's config as a dictionary; keys that change nothing computed are left out.
        weights: What `weights_digest` gave.
        dtype: The name of the floating-point type of the forward pass, such as `float32`.
    """
    meaningful = {key: value for key, value in config.items() if key not in _VOLATILE_CONFIG_KEYS}
    return {"config": digest_of(_without_infinity(meaningful)), "weights": weights, "dtype": dtype}


def _without_infinity(value: Any) -> Any:
    """Write infinities, which JSON has not and some hybrids' time steps go up to, as words."""
    if isinstance(value, Mapping):
        return {key: _without_infinity(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinity(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def weights_digest(folder: Path) -> str:
    """Sha256 over the tensors of a folder's safetensors files, whatever their order or their split into files.

    Raises:
        ModelError: The folder holds no safetensors file, or one that is damaged.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"no *.safetensors file in {folder}; Coldstill reads safetensors only")
    tensors: dict[str, list[Any]] = {}
    for file in files:
        tensors.update(_tensor_digests(file))
    return digest_of(tensors)


def _tensor_digests(file: Path) -> dict[str, list[Any]]:
    """Map each tensor of one safetensors file to its dtype, shape and the sha256 of its bytes."""
    digests: dict[str, list[Any]] = {}
    data_start, entries = header_of(file)
    with file.open("rb") as stream:
        for name, dtype, shape, start, end in entries:
            stream.seek(data_start + start)
            digests[name] = [dtype, shape, _hash_stream(stream, end - start, file)]
    return digests


def _hash_stream(stream: BinaryIO, num_bytes: int, file: Path) -> str:
    hasher = hashlib.sha256()
    while num_bytes:
        block = stream.read(min(num_bytes, _HASH_BLOCK_BYTES))
        if not block:
            raise ModelError(cut_short(file, num_bytes))
        hasher.update(block)
        num_bytes -= len(block)
    return hasher.hexdigest()
