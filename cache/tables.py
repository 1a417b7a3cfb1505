"""Folders of Parquet files whose union counts, each named by the sha256 of its bytes.

Files are immutable. Several may be folded into one at any time, so a reader that misses a file which it has just seen
listed lists again.
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from coldstill.cache.array_object import REPAIR_HINT
from coldstill.cache.errors import CorruptError
from coldstill.cache.identity import FINGERPRINT_CHARS
from coldstill.cache.objects import Objects

SUFFIX = ".parquet"

_MAX_LISTINGS = 5

Parsed = TypeVar("Parsed")


def write_table(objects: Objects, folder: str, table: pa.Table) -> str:
    """Publish a table in a folder, and return its name there."""
    data = parquet_bytes(table)
    name = _name_of(data)
    objects.write(f"{folder}/{name}", data)
    return name


def parse_table(name: str, data: bytes, schema: pa.Schema) -> pa.Table:
    """Read the bytes of one file of a folder and hold them against the file's name.

    Raises:
        ValueError: They are not what was written.
    """
    if _name_of(data) != name:
        raise ValueError("its content is not what it is named by")
    return parquet_table(data, schema)


def parquet_bytes(table: pa.Table) -> bytes:
    """Return a table as the bytes of a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def parquet_names(data: bytes) -> list[str]:
    """Name the columns of Parquet bytes.

    Raises:
        ValueError: They are no Parquet file.
    """
    try:
        return list(pq.read_schema(pa.BufferReader(data)).names)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(str(error)) from None


def parquet_table(data: bytes, schema: pa.Schema) -> pa.Table:
    """Read Parquet bytes of a known schema.

    Raises:
        ValueError: They are no Parquet file of this schema.
    """
    try:
        # Not `io.BytesIO`: Arrow would call back into Python from a thread of its own, and a fork then can deadlock.
        table = pq.read_table(pa.BufferReader(data), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(str(error)) from None
    if table.schema.names != schema.names:
        raise ValueError(f"its columns are {table.schema.names}, expected {schema.names}")
    return table.cast(schema.with_metadata(table.schema.metadata))


def read_folder(
    objects: Objects, folder: str, parse: Callable[[str, bytes], Parsed], *, damaged: list[str] | None = None
) -> dict[str, Parsed]:
    """Parse every file of a folder: its name -> what `parse` makes of its name and bytes.

    Args:
        objects: Where the folder lies.
        folder: Its name.
        parse: Raises ValueError, KeyError or TypeError where the bytes are not what was written.
        damaged: Gains the names of damaged files, which are then left out; without it they are an error.

    Raises:
        CorruptError: A file is damaged.
    """
    for _ in range(_MAX_LISTINGS):
        names = objects.files(folder)
        try:
            contents = [objects.read(f"{folder}/{name}") for name in names]
        except FileNotFoundError:
            continue  # it was folded into another after the listing
        return _parse_all(objects, folder, dict(zip(names, contents, strict=True)), parse, damaged)
    raise CorruptError(f"{objects.root}/{folder} changes faster than it can be read; try again")


def fold(objects: Objects, folder: str, table: pa.Table, names: Sequence[str]) -> str:
    """Publish the union of some files as one table, then remove those files; gives the new file's name."""
    name = write_table(objects, folder, table)
    for old in names:
        if old != name:
            objects.remove(f"{folder}/{old}")
    return name


def _name_of(data: bytes) -> str:
    return f"{hashlib.sha256(data).hexdigest()[:FINGERPRINT_CHARS]}{SUFFIX}"


def _parse_all(
    objects: Objects,
    folder: str,
    contents: dict[str, bytes],
    parse: Callable[[str, bytes], Parsed],
    damaged: list[str] | None,
) -> dict[str, Parsed]:
    parsed = {}
    for name, data in contents.items():
        try:
            parsed[name] = parse(name, data)
        except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
            if damaged is None:
                raise CorruptError(
                    f"{folder}/{name} of store {objects.root} is corrupt: {error}; {REPAIR_HINT}"
                ) from None
            damaged.append(name)
    return parsed
