"""Tensors in a model's safetensors files: which there are, and reading one straight into memory of torch's own.

Nothing is mapped into memory, so that what a process holds is what it read.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from coldstill.pipeline.runtime.errors import ModelError

_WHOLE_FILE, _INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_LARGEST_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        file: The file.
        dtype: As safetensors calls it, such as `BF16`.
        shape: Its shape.
        start: Its first byte within the file.
        num_bytes: Its bytes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    @property
    def num_values(self) -> int:
        """How many numbers it holds."""
        return torch.Size(self.shape).numel()

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its dtype as torch has it.

        Raises:
            ModelError: torch has none that is known here.
        """
        if self.dtype not in _DTYPES:
            raise ModelError(f"{self.file} has tensors of dtype {self.dtype}; expected one of {', '.join(_DTYPES)}")
        return _DTYPES[self.dtype]

    def read(self, *, is_pinned: bool = False) -> Tensor:
        """Read it, in its own dtype, into memory of the host.

        Args:
            is_pinned: Whether that memory is to be pinned, from which a GPU copies while it computes.

        Raises:
            ModelError: The file is shorter than its header says.
        """
        dtype = self.torch_dtype
        bytes_N = torch.empty(self.num_bytes, dtype=torch.uint8, pin_memory=is_pinned)
        left: memoryview = bytes_N.numpy().data
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.start)
            while left:
                num_read = stream.readinto(left)
                if not num_read:
                    raise ModelError(cut_short(self.file, len(left)))
                left = left[num_read:]
        return bytes_N.view(dtype).view(self.shape)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of the files that transformers reads of a model's folder, by name; only headers are read.

    Raises:
        ModelError: There is no such file, one that the index names is not there, or one is damaged.
    """
    tensors = {}
    for file in weight_files(folder):
        data_start, entries = header_of(file)
        for name, dtype, shape, start, end in entries:
            tensors[name] = StoredTensor(file, dtype, tuple(shape), data_start + start, end - start)
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers reads of a model's folder.

    Raises:
        ModelError: There is none, or one that the index names is not there.
    """
    if (folder / _WHOLE_FILE).is_file():
        return [folder / _WHOLE_FILE]
    index = folder / _INDEX_FILE
    if not index.is_file():
        raise ModelError(f"no *.safetensors file in {folder}; Coldstill reads safetensors only")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is no index of safetensors files: {type(error).__name__}: {error}") from None
    for name in names:
        if not (folder / name).is_file():
            raise ModelError(
                f"{index} names {name}, and {folder} has no such file: download or save the whole model again"
            )
    return [folder / name for name in names]


def header_of(file: Path) -> tuple[int, list[tuple[str, str, list[int], int, int]]]:
    """Return where a safetensors file's data starts, and each tensor's name, dtype, shape, start and end within it.

    Raises:
        ModelError: It is not such a file.
    """
    with file.open("rb") as stream:
        try:
            return _read_header(stream)
        except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{file} is not a safetensors file: {type(error).__name__}: {error}") from None


def cut_short(file: Path, num_bytes: int) -> str:
    """Say that a file lacks so many bytes."""
    return f"{file} is cut short: {num_bytes} bytes are missing; download or save it again"


def _read_header(stream: BinaryIO) -> tuple[int, list[tuple[str, str, list[int], int, int]]]:
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
