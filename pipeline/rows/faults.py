"""What is wrong with a source whose reading failed: the file, the place in it, and what to do, in one line.

The library that reads says little more than that an error occurred; the cause is in the exceptions behind that one, and
the place only in the files themselves, which are read once more.
"""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec

from coldstill.pipeline.recipe.data import SourceConfig
from coldstill.pipeline.runtime.errors import DataError

# The readers of `datasets` that take files, by name.
FILE_READERS = frozenset({"text", "json", "csv", "parquet", "arrow"})
_READERS_WITH_ENCODING = frozenset({"text", "json", "csv"})
_NOTHING_TO_READ = ("SchemaInferenceError", "EmptyDataError", "StopIteration")
_NO_ROWS = "corresponds to no data"
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def source_name(source: SourceConfig) -> str:
    """Name a source as a person knows it: its path, and the files that it is read from."""
    files = [source.data_files] if isinstance(source.data_files, str) else source.data_files or []
    shown = ", ".join(files[:2]) + (f" and {len(files) - 2} more" if len(files) > 2 else "")
    return f"{source.path!r} ({shown})" if files else repr(source.path)


def reading_fault(error: BaseException, source: SourceConfig) -> DataError:
    """Say why a source cannot be read, by the cause behind what the library raised."""
    cause = _cause(error)
    if type(cause).__name__ in _NOTHING_TO_READ or _NO_ROWS in str(cause):
        return nothing_to_read(source)
    local = _local_files(source) or _LocalFiles("", [])
    place = None
    if isinstance(cause, UnicodeDecodeError) and local.reader in _READERS_WITH_ENCODING:
        place = _undecodable(cause, local.files, str(source.options.get("encoding", cause.encoding)))
    elif local.reader == "json":
        place = _broken_json(local.files)
    reason = place or " ".join(str(cause).split()) or type(cause).__name__
    return DataError(f"cannot load data set {source_name(source)}: {reason}")


def nothing_to_read(source: SourceConfig) -> DataError:
    """Say why a source gave not one row: no file is there, or all are empty."""
    local = _local_files(source)
    if local is not None and not local.files:
        return DataError(f"data set {source_name(source)}: no file matches data_files")
    if local is not None and all(Path(file).stat().st_size == 0 for file in local.files):
        rest = f", and so are {len(local.files) - 1} more files" if len(local.files) > 1 else ""
        return DataError(f"data set {source_name(source)} holds no text: {local.files[0]} is empty{rest}")
    return DataError(f"data set {source_name(source)} holds no rows in split {source.split!r}")


def _cause(error: BaseException) -> BaseException:
    """Return the first exception that says something: `datasets` wraps it in one that does not."""
    while type(error).__name__ == "DatasetGenerationError" and (behind := error.__cause__ or error.__context__):
        error = behind
    return error


def _undecodable(error: UnicodeDecodeError, files: list[str], encoding: str) -> str:
    where, guess = next(_undecodable_lines(files, encoding), ("a file", "latin-1"))
    return (
        f"{where} is not {encoding}: byte 0x{error.object[error.start]:02x} cannot be read; name the encoding that it "
        f"was written in, such as options: {{encoding: {guess}}}, or convert it to UTF-8"
    )


def _undecodable_lines(files: list[str], encoding: str) -> Iterator[tuple[str, str]]:
    """Yield each file that its encoding does not fit: where, and what it may be written in instead."""
    for file in files:
        decoder = codecs.getincrementaldecoder(encoding)()
        with _opened(file) as stream:
            number = 0
            try:
                for number, line in enumerate(stream, start=1):
                    if number == 1 and line.startswith(_UTF16_MARKS):
                        yield file, "utf-16"
                    decoder.decode(line)
                decoder.decode(b"", final=True)
            except UnicodeDecodeError:
                yield f"{file}, line {number},", "latin-1"


def _broken_json(files: list[str]) -> str | None:
    """Find the first line that is no JSON, in files of JSON Lines and in those that are one list."""
    for file in files:
        try:
            with _opened(file) as stream:
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        _parse_line(line, number)
        except json.JSONDecodeError as error:
            try:
                with _opened(file) as stream:
                    json.loads(stream.read())
            except json.JSONDecodeError as whole:
                # A file of JSON Lines is whole up to its second line; one that is a list breaks where it is broken.
                wrong = error if whole.msg == "Extra data" else whole
                return f"{file}, line {wrong.lineno}: no JSON ({wrong.msg}, column {wrong.colno}); mend or remove it"
        except (UnicodeDecodeError, OSError):
            return None
    return None


def _parse_line(line: bytes, number: int) -> None:
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        error.lineno = number
        raise


@dataclass(frozen=True)
class _LocalFiles:
    """The files on this machine that a source is read from, and the reader that `datasets` takes for them."""

    reader: str
    files: list[str]


def _local_files(source: SourceConfig) -> _LocalFiles | None:
    """Find the files of a source; None where some are elsewhere, or where that cannot be told."""
    import datasets

    if source.path not in FILE_READERS and not Path(source.path).exists():
        return None
    try:
        builder = datasets.load_dataset_builder(
            source.path, source.name, data_dir=source.data_dir, data_files=source.data_files
        )
        files = [str(file) for split in builder.config.data_files.values() for file in split]
    except Exception:  # why not was said when the source was loaded
        return None
    return None if any("://" in file for file in files) else _LocalFiles(str(builder.name), files)


def _opened(file: str) -> IO[Any]:
    """Open a file for its bytes, unpacked where its name says that it is compressed."""
    opened: IO[Any] = fsspec.open(file, "rb", compression="infer").open()
    return opened
