"""What a column is: named arrays with dtype and shape per token, per row or per shard, and its metadata.

A column's name says everything that decides its bytes (`hidden/12/int8`, `logits/topk/64/float16`), so that two columns
which differ in anything live side by side and none is ever rewritten.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Axis = Literal["token", "row", "shard"]

DTYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "float16", "float32", "float64")

_NAME = re.compile(r"[a-z0-9_][a-z0-9_.]*(/[a-z0-9_][a-z0-9_.]*)*")
CHUNK_TARGET_BYTES = 1 << 18
# A row is read by its chunks, so a chunk should not hold many rows: no more than so many tokens, but in a narrow array,
# where the work for a chunk outweighs its bytes.
_LONGEST_CHUNK = 512
_SMALLEST_CHUNK_BYTES = 1 << 14


@dataclass(frozen=True)
class ArraySpec:
    """One array of a column.

    Attributes:
        dtype: One of `DTYPES`. Bfloat16 is no Zarr type: store its bits as uint16 and say so in the attributes.
        shape: The shape at one index of the axis, or the whole shape where the axis is the shard.
        axis: What the first dimension counts: the shard's tokens, its rows, or nothing (one value for the shard).
    """

    dtype: str
    shape: tuple[int, ...] = ()
    axis: Axis = "token"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if any(length < 1 for length in self.shape):
            raise ValueError(f"every length of an array's shape must be positive, got {self.shape}")
        if self.axis == "shard" and not self.shape:
            raise ValueError("an array of the shard needs a shape; store a single number with shape (1,)")

    def full_shape(self, *, num_tokens: int, num_rows: int) -> tuple[int, ...]:
        """Return the array's shape in a shard of that many tokens and rows."""
        if self.axis == "shard":
            return self.shape
        return (num_tokens if self.axis == "token" else num_rows, *self.shape)

    def chunk_length(self, length: int) -> int:
        """Return how many indices of the first dimension one chunk holds: a power of two, or all of a shorter array."""
        itemsize = np.dtype(self.dtype).itemsize
        trailing = self.shape[1:] if self.axis == "shard" else self.shape
        bytes_per_index = itemsize * int(np.prod(trailing, dtype=np.int64))
        fitting = max(CHUNK_TARGET_BYTES // bytes_per_index, 1)
        if self.axis != "shard":
            fitting = min(fitting, max(_LONGEST_CHUNK, _SMALLEST_CHUNK_BYTES // bytes_per_index))
        return min(1 << (fitting.bit_length() - 1), length)

    def dimension_names(self) -> tuple[str | None, ...]:
        """Name the first dimension as Zarr readers will see it."""
        inner = len(self.shape)
        return (None,) * inner if self.axis == "shard" else (self.axis, *(None,) * inner)


@dataclass(frozen=True)
class Column:
    """A column: what to write into a shard, or what is there.

    Attributes:
        name: Lower-case words with `/` between them; the column's Zarr group within a shard.
        arrays: Each array of the column by its name.
        attributes: JSON-able facts that a reader needs to understand the numbers; the same for every shard.
    """

    name: str
    arrays: Mapping[str, ArraySpec]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"column name {self.name!r} must be lower-case words joined by '/'")
        if not self.arrays:
            raise ValueError(f"column {self.name} has no arrays")

    def to_json(self) -> dict[str, Any]:
        """Return the column as JSON-able data."""
        arrays = {
            name: {"dtype": spec.dtype, "shape": list(spec.shape), "axis": spec.axis}
            for name, spec in self.arrays.items()
        }
        return {"name": self.name, "arrays": arrays, "attributes": dict(self.attributes)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Column":
        """Rebuild a column from what `to_json` gave."""
        arrays = {
            name: ArraySpec(dtype=entry["dtype"], shape=tuple(entry["shape"]), axis=entry["axis"])
            for name, entry in data["arrays"].items()
        }
        return cls(name=data["name"], arrays=arrays, attributes=data["attributes"])
