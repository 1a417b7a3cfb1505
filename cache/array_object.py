"""One array of a shard as one object: Zarr v3's `sharding_indexed` codec over zstd chunks with a crc32c each.

The object is the encoded chunks one after another, then an index of (offset, length) pairs as little-endian uint64,
then the index's crc32c. Any Zarr v3 reader opens it through the `zarr.json` beside it. Coldstill encodes and decodes it
itself because Zarr reads a missing object as zeros and costs several times the codec for a single row.
"""

import json
from collections.abc import Callable
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs.zstd import Zstd
from zarr.codecs import Crc32cCodec, ZstdCodec

from cache.columns import ArraySpec
from cache.errors import CorruptError

ZSTD_LEVEL = 3
CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16

ReadRange = Callable[[int, int], bytes]


def object_name(spec: ArraySpec) -> str:
    """Name the array's only object within its Zarr array."""
    num_dimensions = len(spec.shape) + (spec.axis != "shard")
    return "c/" + "/".join("0" * num_dimensions)


def zarr_metadata(spec: ArraySpec, shape: tuple[int, ...]) -> bytes:
    """Give the array's `zarr.json`."""
    chunk = spec.chunk_length(shape[0])
    num_chunks = _num_chunks(shape[0], chunk)
    memory: dict[str, Any] = {}
    zarr.create_array(
        memory,
        shape=shape,
        dtype=spec.dtype,
        chunks=(chunk, *shape[1:]),
        shards=(chunk * num_chunks, *shape[1:]),
        compressors=[ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()],
        fill_value=0,
        dimension_names=spec.dimension_names(),
    )
    return json.dumps(json.loads(memory["zarr.json"].to_bytes()), indent=1).encode()


def encode(array: np.ndarray, spec: ArraySpec) -> bytes:
    """Encode a whole array, of the spec's dtype and full shape, as its object."""
    little_endian = np.ascontiguousarray(array, dtype=np.dtype(spec.dtype).newbyteorder("<"))
    length = spec.chunk_length(len(array))
    codec = Zstd(level=ZSTD_LEVEL)
    parts: list[bytes] = []
    index: list[int] = []
    offset = 0
    for start in range(0, len(array), length):
        chunk = little_endian[start : start + length]
        if len(chunk) < length:
            chunk = np.concatenate([chunk, np.zeros((length - len(chunk), *chunk.shape[1:]), chunk.dtype)])
        compressed = codec.encode(chunk)
        parts += [compressed, _crc(compressed)]
        index += [offset, len(compressed) + CRC_BYTES]
        offset += len(compressed) + CRC_BYTES
    index_bytes = np.array(index, dtype="<u8").tobytes()
    return b"".join([*parts, index_bytes, _crc(index_bytes)])


class ArrayObject:
    """Read parts of one encoded array, each chunk checked against its crc32c.

    Args:
        read_range: Gives `num_bytes` from `start` of the object; a negative start counts from the object's end.
        spec: What the array is.
        shape: Its full shape in this shard.
        label: How errors name it: column, array and shard.

    Raises:
        CorruptError: The object is missing, cut short or altered.
    """

    def __init__(self, read_range: ReadRange, *, spec: ArraySpec, shape: tuple[int, ...], label: str) -> None:
        self._read_range = read_range
        self.shape = shape
        self._dtype = np.dtype(spec.dtype).newbyteorder("<")
        self._chunk_shape = (spec.chunk_length(shape[0]), *shape[1:])
        self._label = label
        self._offsets = self._read_index()

    @property
    def chunk_length(self) -> int:
        """How many indices of the first dimension each chunk holds."""
        return self._chunk_shape[0]

    def chunk(self, number: int) -> np.ndarray:
        """Decode one chunk; the last one is cut to the array's own length."""
        start, num_bytes = (int(value) for value in self._offsets[number])
        compressed = self._checked(self._read(start, num_bytes), f"chunk {number}")
        try:
            decoded = Zstd().decode(compressed)
        except (RuntimeError, ValueError) as error:
            raise self._corrupt(f"chunk {number} does not decompress ({error})") from None
        values = np.frombuffer(decoded, self._dtype)
        if values.size != np.prod(self._chunk_shape):
            raise self._corrupt(f"chunk {number} holds {values.size} values, expected {np.prod(self._chunk_shape)}")
        first = number * self._chunk_shape[0]
        return values.reshape(self._chunk_shape)[: self.shape[0] - first]

    def _read_index(self) -> np.ndarray:
        num_chunks = _num_chunks(self.shape[0], self._chunk_shape[0])
        num_bytes = num_chunks * INDEX_ENTRY_BYTES + CRC_BYTES
        index = self._checked(self._read(-num_bytes, num_bytes), "the index")
        return np.frombuffer(index, "<u8").reshape(num_chunks, 2)

    def _read(self, start: int, num_bytes: int) -> bytes:
        try:
            data = self._read_range(start, num_bytes)
        except FileNotFoundError:
            raise self._corrupt("its object is missing") from None
        if len(data) != num_bytes:
            raise self._corrupt("its object is cut short")
        return data

    def _checked(self, data: bytes, what: str) -> bytes:
        body = data[:-CRC_BYTES]
        if _crc(body) != data[-CRC_BYTES:]:
            raise self._corrupt(f"{what} fails its crc32c")
        return body

    def _corrupt(self, what: str) -> CorruptError:
        return CorruptError(f"{self._label} is corrupt: {what}; delete the store and run precompute again")


def _num_chunks(length: int, chunk: int) -> int:
    return -(-length // chunk)


def _crc(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(CRC_BYTES, "little")
