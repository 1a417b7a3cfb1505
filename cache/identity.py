"""Fingerprints: the names of stores, token rows and shards.

Everything here is a pure function of content. Paths, dates, batch sizes, devices and worker counts never enter.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

ROW_ID_BYTES = 16
FINGERPRINT_CHARS = 16

_ROW = b"coldstill row 1\0"


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
    return hashlib.sha256(_ROW + little_endian.tobytes()).digest()[:ROW_ID_BYTES]


def row_ids(token_ids: np.ndarray, lengths: Iterable[int]) -> np.ndarray:
    """Identify many rows: `row_id` of each, one behind the other, `V16` [rows].

    Args:
        token_ids: Of all rows behind one another, uint32.
        lengths: How many of them each row has.
    """
    data, start, found = np.ascontiguousarray(token_ids, "<u4").tobytes(), 0, []
    for length in lengths:
        stop = start + 4 * length
        found.append(hashlib.sha256(_ROW + data[start:stop]).digest()[:ROW_ID_BYTES])
        start = stop
    return np.frombuffer(b"".join(found), f"V{ROW_ID_BYTES}")


def shard_id(row_ids: Iterable[bytes]) -> str:
    """Name a shard by the rows that it holds, in their order."""
    hasher = hashlib.sha256(b"coldstill shard 1\0")
    for identifier in row_ids:
        hasher.update(identifier)
    return hasher.hexdigest()[:FINGERPRINT_CHARS]


def fingerprint(identity: Mapping[str, str]) -> str:
    """Shorten the identity of a store's teacher, as the caller has it, to the name of the store."""
    return digest_of(dict(identity))[:FINGERPRINT_CHARS]
