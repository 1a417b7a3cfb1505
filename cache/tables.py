"""Folders of Parquet files whose union counts, each named by the sha256 of its bytes.

Files are immutable. Several may be folded into one at any time, so a reader that misses a file which it has just seen
listed lists again. A file may be larger than what one wants to hold in memory: it is read and written by slices.
"""

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from coldstill.cache.array_object import REPAIR_HINT
from coldstill.cache.errors import CorruptError
from coldstill.cache.identity import FINGERPRINT_CHARS
from coldstill.cache.objects import Objects
from coldstill.cache.records import SLICE_RECORDS, scratch_folder

SUFFIX = ".parquet"
# Lines of a row group: as many as Arrow takes by itself, so that a table has the same bytes in whatever slices it is
# written.
GROUP_LINES = 1 << 20

_MAX_LISTINGS = 5
_READ_AT_ONCE_BYTES = 8 << 20

Parsed = TypeVar("Parsed")


def write_table(objects: Objects, folder: str, table: pa.Table) -> str:
    """Publish a table in a folder, and return its name there."""
    return write_tables(objects, folder, [table])


def write_tables(objects: Objects, folder: str, groups: Iterable[pa.Table]) -> str:
    """Publish a table in a folder, which comes in slices of `GROUP_LINES` lines, and return its name there."""
    with parquet_of(groups) as file:
        name = _name_of(file)
        objects.write_file(f"{folder}/{name}", file)
    return name


@contextlib.contextmanager
def parquet_of(groups: Iterable[pa.Table]) -> Iterator[IO[bytes]]:
    """Yield a table as the bytes of a Parquet file; it comes in slices, at least one, of `GROUP_LINES` lines."""
    with _scratch_file() as file, contextlib.ExitStack() as stack:
        writer = None
        for group in groups:
            writer = writer or stack.enter_context(pq.ParquetWriter(file, group.schema, compression="zstd"))
            writer.write_table(group, row_group_size=GROUP_LINES)
            del group  # while the next one is made
        stack.close()
        file.seek(0)
        yield file


def fetch(objects: Objects, name: str) -> IO[bytes]:
    """Copy an object piece by piece, so that what is checked of it is what is read of it.

    Raises:
        FileNotFoundError: There is no such object.
    """
    file = _scratch_file()
    try:
        while True:
            (part,) = objects.read_ranges([(name, file.tell(), _READ_AT_ONCE_BYTES)])
            file.write(part)
            if len(part) < _READ_AT_ONCE_BYTES:
                break
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return file


def check_name(name: str, file: IO[bytes]) -> None:
    """Hold the bytes of one file of a folder against the file's name.

    Raises:
        ValueError: They are not what was written.
    """
    if _name_of(file) != name:
        raise ValueError("its content is not what it is named by")


def parse_table(name: str, file: IO[bytes], schema: pa.Schema) -> pa.Table:
    """Read one file of a folder, all of it, and hold it against the file's name.

    Raises:
        ValueError: They are not what was written.
    """
    check_name(name, file)
    with open_parquet(file, schema) as parquet:
        tables = [parquet.schema_arrow.empty_table(), *table_slices(parquet)]
        return pa.concat_tables(tables).cast(schema.with_metadata(parquet.schema_arrow.metadata)).combine_chunks()


@contextlib.contextmanager
def open_parquet(file: IO[bytes], schema: pa.Schema | None = None) -> Iterator[pq.ParquetFile]:
    """Open Parquet bytes for reading, of a known schema where one is given.

    Raises:
        ValueError: They are no Parquet file, or of another schema.
    """
    try:
        with _arrow_file(file) as source:
            # Not in advance and by no thread: a process that is forked off while one works can wait for ever.
            parquet = pq.ParquetFile(source, pre_buffer=False)
            if schema is not None:
                check_columns(parquet, schema)
            yield parquet
    except (pa.ArrowException, OSError) as error:
        raise ValueError(str(error)) from None


def check_columns(parquet: pq.ParquetFile, schema: pa.Schema) -> None:
    """Hold the columns of a Parquet file against a schema.

    Raises:
        ValueError: They are others.
    """
    names = parquet.schema_arrow.names
    if names != schema.names:
        raise ValueError(f"its columns are {names}, expected {schema.names}")


def table_slices(parquet: pq.ParquetFile, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Yield some columns of a Parquet file, all where none are named, a slice of lines at a time."""
    for batch in parquet.iter_batches(batch_size=SLICE_RECORDS, columns=columns, use_threads=False):
        yield pa.Table.from_batches([batch])


def read_folder(
    objects: Objects, folder: str, parse: Callable[[str, IO[bytes]], Parsed], *, damaged: list[str] | None = None
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
        found: list[str] = []
        try:
            parsed = _parse_all(objects, folder, parse, None if damaged is None else found)
        except FileNotFoundError:
            continue  # it was folded into another after the listing
        if damaged is not None:
            damaged += found
        return parsed
    raise CorruptError(f"{objects.root}/{folder} changes faster than it can be read; try again")


def fold(objects: Objects, folder: str, groups: Iterable[pa.Table], names: Sequence[str]) -> str:
    """Publish the union of some files as one table, then remove those files; gives the new file's name."""
    name = write_tables(objects, folder, groups)
    for old in names:
        if old != name:
            objects.remove(f"{folder}/{old}")
    return name


def _name_of(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while part := file.read(_READ_AT_ONCE_BYTES):
        digest.update(part)
    file.seek(0)
    return f"{digest.hexdigest()[:FINGERPRINT_CHARS]}{SUFFIX}"


def _scratch_file() -> IO[bytes]:
    return tempfile.SpooledTemporaryFile(_READ_AT_ONCE_BYTES, dir=scratch_folder())


def _arrow_file(file: IO[bytes]) -> pa.NativeFile:
    """Open a file for Arrow itself, which else would call back into Python, from a thread of its own."""
    # What is small lies in memory, and its name is none.
    name = getattr(file, "name", None)
    return pa.BufferReader(file.read()) if name is None else pa.OSFile(f"/dev/fd/{file.fileno()}")


def _parse_all(
    objects: Objects, folder: str, parse: Callable[[str, IO[bytes]], Parsed], damaged: list[str] | None
) -> dict[str, Parsed]:
    parsed = {}
    for name in objects.files(folder):
        with fetch(objects, f"{folder}/{name}") as file:
            try:
                parsed[name] = parse(name, file)
            except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
                if damaged is None:
                    raise CorruptError(
                        f"{folder}/{name} of store {objects.root} is corrupt: {error}; {REPAIR_HINT}"
                    ) from None
                damaged.append(name)
    return parsed
