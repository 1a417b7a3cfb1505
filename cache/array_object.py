"""One array of a shard as one object: Zarr v3's `sharding_indexed` codec over zstd chunks with a crc32c each.

The object is the encoded chunks one after another, then an index of (offset, length) pairs as little-endian uint64,
then the index's crc32c. Any Zarr v3 reader opens it through the `zarr.json` beside it. Coldstill encodes and decodes it
itself because Zarr reads a missing object as zeros and costs several times the codec for a single row.
"""

import json
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.zstd import Zstd

from coldstill.cache.columns import ArraySpec
from coldstill.cache.errors import CorruptError

ZSTD_LEVEL = 3
CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16
REPAIR_HINT = "run: coldstill cache repair"

_ZSTD = Zstd(level=ZSTD_LEVEL)
_ZSTD_MAGIC = bytes.fromhex("28b52ffd")

# An object of at most this size is read at once, index and chunks together.
SMALL_OBJECT_BYTES = 1 << 15


def object_name(spec: ArraySpec) -> str:
    """Name the array's only object within its Zarr array."""
    num_dimensions = len(spec.shape) + (spec.axis != "shard")
    return ".".join(["c", *"0" * num_dimensions])


def zarr_metadata(spec: ArraySpec, shape: tuple[int, ...]) -> bytes:
    """Return the array's `zarr.json`; the same bytes whatever release of Zarr is installed."""
    chunk = spec.chunk_length(shape[0])
    bytes_codec: dict[str, Any] = {"name": "bytes"}
    if np.dtype(spec.dtype).itemsize > 1:
        bytes_codec["configuration"] = {"endian": "little"}
    index_codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    zstd = {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}}
    sharding = {
        "chunk_shape": [chunk, *shape[1:]],
        "codecs": [bytes_codec, zstd, {"name": "crc32c"}],
        "index_codecs": index_codecs,
        "index_location": "end",
    }
    grid_shape = [chunk * _num_chunks(shape[0], chunk), *shape[1:]]
    metadata = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": spec.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": grid_shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0.0 if spec.dtype.startswith("float") else 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "dimension_names": list(spec.dimension_names()),
        "attributes": {},
    }
    return json.dumps(metadata, indent=1).encode()


def encode(array: np.ndarray, spec: ArraySpec) -> bytes:
    """Encode a whole array, of the spec's dtype and full shape, as its object."""
    little_endian = np.ascontiguousarray(array, dtype=np.dtype(spec.dtype).newbyteorder("<"))
    length = spec.chunk_length(len(array))
    parts: list[bytes] = []
    index: list[int] = []
    offset = 0
    for start in range(0, len(array), length):
        chunk = little_endian[start : start + length]
        if len(chunk) < length:
            chunk = np.concatenate([chunk, np.zeros((length - len(chunk), *chunk.shape[1:]), chunk.dtype)])
        compressed = _ZSTD.encode(chunk)
        parts += [compressed, _crc(compressed)]
        index += [offset, len(compressed) + CRC_BYTES]
        offset += len(compressed) + CRC_BYTES
    index_bytes = np.array(index, dtype="<u8").tobytes()
    return b"".join([*parts, index_bytes, _crc(index_bytes)])


class ArrayObject:
    """Decode parts of one encoded array, each checked against its crc32c. Reads nothing itself.

    Ask for `index_range`, hand the bytes to `take_index`; then for each chunk ask for `chunk_range` and hand its bytes
    to `decode`. So a reader can fetch the ranges of many arrays at once.

    Args:
        spec: What the array is.
        shape: Its full shape in this shard.
        num_bytes: Size of the object.
        label: How errors name it: column, array and shard.
        advice: What errors tell the user to do.
    """

    def __init__(
        self, *, spec: ArraySpec, shape: tuple[int, ...], num_bytes: int, label: str, advice: str = REPAIR_HINT
    ) -> None:
        self.shape = shape
        self.chunk_length = spec.chunk_length(shape[0])
        self.num_chunks = _num_chunks(shape[0], self.chunk_length)
        self._num_bytes = num_bytes
        self._dtype = np.dtype(spec.dtype).newbyteorder("<")
        self._chunk_shape = (self.chunk_length, *shape[1:])
        self.chunk_bytes = int(np.prod(self._chunk_shape)) * self._dtype.itemsize
        self._label = label
        self._advice = advice
        self._offsets: list[tuple[int, int]] = []
        self._whole: bytes | None = None

    @property
    def index_range(self) -> tuple[int, int]:
        """Start and number of bytes of the index; of all of a small object."""
        if self._num_bytes <= SMALL_OBJECT_BYTES:
            return 0, self._num_bytes
        num_bytes = self.num_chunks * INDEX_ENTRY_BYTES + CRC_BYTES
        return max(self._num_bytes - num_bytes, 0), num_bytes

    def take_index(self, data: bytes) -> None:
        """Take what lies in `index_range`.

        Raises:
            CorruptError: It is cut short or altered.
        """
        if len(data) != self.index_range[1]:
            raise self.corrupt("its object is cut short")
        if self.index_range == (0, self._num_bytes):
            self._whole = data
        index = self._checked(data[-(self.num_chunks * INDEX_ENTRY_BYTES + CRC_BYTES) :], "the index")
        if len(index) != self.num_chunks * INDEX_ENTRY_BYTES:
            raise self.corrupt("its object is cut short")
        numbers = np.frombuffer(index, "<u8").tolist()
        self._offsets = list(zip(numbers[::2], numbers[1::2], strict=True))

    def chunk_range(self, number: int) -> tuple[int, int]:
        """Start and number of bytes of a chunk; (0, 0) where its bytes came with the index."""
        return (0, 0) if self._whole is not None else self._offsets[number]

    def empty(self, num_chunks: int) -> np.ndarray:
        """Make room for some chunks one behind the other."""
        return np.empty((num_chunks * self.chunk_length, *self._chunk_shape[1:]), self._dtype)

    def decode(self, number: int, data: bytes, out: np.ndarray) -> None:
        """Decode one chunk from what lies in `chunk_range`; the last one is filled up behind the array's end.

        Args:
            number: Of the chunk.
            data: Its bytes.
            out: Where its values go; a contiguous part of what `empty` gave.

        Raises:
            CorruptError: It is cut short or altered.
        """
        start, num_bytes = self._offsets[number]
        if self._whole is not None:
            data = self._whole[start : start + num_bytes]
        if len(data) != num_bytes:
            raise self.corrupt("its object is cut short")
        compressed = self._checked(data, f"chunk {number}")
        if _content_bytes(compressed) != out.nbytes:
            raise self.corrupt(f"chunk {number} does not hold {out.size} values")
        try:
            _ZSTD.decode(compressed, out=out)
        except (RuntimeError, ValueError) as error:
            raise self.corrupt(f"chunk {number} does not decompress ({error})") from None

    def corrupt(self, what: str) -> CorruptError:
        """Return the error that names this array and what is wrong with it."""
        return CorruptError(f"{self._label} is corrupt: {what}; {self._advice}")

    def _checked(self, data: bytes, what: str) -> bytes:
        body = data[:-CRC_BYTES]
        if _crc(body) != data[-CRC_BYTES:]:
            raise self.corrupt(f"{what} fails its crc32c")
        return body


def _num_chunks(length: int, chunk: int) -> int:
    return -(-length // chunk)


def _content_bytes(frame: bytes) -> int | None:
    """Return the decompressed size that a zstd frame's header names (RFC 8878, section 3.1.1.1), or None.

    The decompressor itself does not mind a frame that fills only a part of where it goes.
    """
    if len(frame) < 6 or frame[:4] != _ZSTD_MAGIC:
        return None
    descriptor = frame[4]
    is_single_segment = bool(descriptor & 0x20)
    num_bytes = (int(is_single_segment), 2, 4, 8)[descriptor >> 6]
    start = 5 + (not is_single_segment) + (0, 1, 2, 4)[descriptor & 3]
    size = int.from_bytes(frame[start : start + num_bytes], "little")
    return None if num_bytes == 0 else size + 256 * (num_bytes == 2)


def _crc(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(CRC_BYTES, "little")
