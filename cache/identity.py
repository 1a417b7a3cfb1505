"""Fingerprints: which teacher, which token row, which selection of rows.

Everything here is a pure function of content. Paths, dates, batch sizes, devices and worker counts never enter.
"""

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from coldstill.cache.errors import ModelError

ROW_ID_BYTES = 16
FINGERPRINT_CHARS = 16

# Fields of a model's config that say nothing about what it computes.
_VOLATILE_CONFIG_KEYS = frozenset(
    {"_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}
)
_HASH_BLOCK_BYTES = 1 << 22
_LARGEST_HEADER_BYTES = 100_000_000  # the limit of the safetensors format


def digest_of(value: Any) -> str:
    """Sha256 of a JSON-able value in canonical form (sorted keys, no spaces), in hexadecimal."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def row_id(token_ids_T: np.ndarray) -> bytes:
    """Identify one row of token ids, shape [T], by content: 16 bytes, the same for every integer dtype."""
    if token_ids_T.ndim != 1:
        raise ValueError(f"a row is one-dimensional, got shape {token_ids_T.shape}")
    if token_ids_T.dtype.kind not in "iu" or (
        len(token_ids_T) and not 0 <= token_ids_T.min() <= token_ids_T.max() < 2**32
    ):
        raise ValueError(f"token ids are whole numbers from 0 to 2**32 - 1, got {token_ids_T.dtype}: {token_ids_T}")
    little_endian = np.ascontiguousarray(token_ids_T, dtype="<u4")
    return hashlib.sha256(b"coldstill row 1\0" + little_endian.tobytes()).digest()[:ROW_ID_BYTES]


def shard_id(row_ids: Iterable[bytes]) -> str:
    """Name a shard by the rows that it holds, in their order."""
    hasher = hashlib.sha256(b"coldstill shard 1\0")
    for identifier in row_ids:
        hasher.update(identifier)
    return hasher.hexdigest()[:FINGERPRINT_CHARS]


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


def fingerprint(identity: Mapping[str, str]) -> str:
    """Shorten an identity to the name of its store."""
    return digest_of(dict(identity))[:FINGERPRINT_CHARS]


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
    with file.open("rb") as stream:
        try:
            data_start, entries = _read_header(stream)
        except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{file} is not a safetensors file: {type(error).__name__}: {error}") from None
        for name, dtype, shape, start, end in entries:
            stream.seek(data_start + start)
            digests[name] = [dtype, shape, _hash_stream(stream, end - start, file)]
    return digests


def _read_header(stream: BinaryIO) -> tuple[int, list[tuple[str, str, list[int], int, int]]]:
    """Give where a safetensors file's data starts, and each tensor's name, dtype, shape, start and end within it."""
    (header_bytes,) = struct.unpack("<Q", stream.read(8))
    header = json.loads(stream.read(min(header_bytes, _LARGEST_HEADER_BYTES)))
    header.pop("__metadata__", None)
    entries = []
    for name, entry in header.items():
        start, end = map(int, entry["data_offsets"])
        if not 0 <= start <= end:
            raise ValueError(f"tensor {name} has data_offsets {start} to {end}")
        entries.append((name, entry["dtype"], entry["shape"], start, end))
    return 8 + header_bytes, entries


def _hash_stream(stream: BinaryIO, num_bytes: int, file: Path) -> str:
    hasher = hashlib.sha256()
    while num_bytes:
        block = stream.read(min(num_bytes, _HASH_BLOCK_BYTES))
        if not block:
            raise ModelError(f"{file} is cut short: {num_bytes} bytes are missing; download or save it again")
        hasher.update(block)
        num_bytes -= len(block)
    return hasher.hexdigest()
