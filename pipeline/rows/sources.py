"""Documents, one after another, from files, data sets and the built-in corpus. Knows columns of text, no tokens."""

import glob
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldstill.pipeline.recipe.data import SourceConfig
from coldstill.pipeline.rows import builtin_corpus
from coldstill.pipeline.rows.faults import FILE_READERS, nothing_to_read, reading_fault, source_name
from coldstill.pipeline.runtime.errors import DataError

# Which reader takes a file, by the ending of its name.
_READERS = {
    ".txt": "text",
    ".md": "text",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_COMPRESSIONS = frozenset({".gz", ".bz2", ".xz", ".zst", ".lz4"})
_BYTE_ORDER_MARK = "\ufeff"
# Headings and other short lines recur in any text; sharing one is no leak.
_SHORTEST_SHARED_CHARACTERS = 64


@dataclass(frozen=True)
class Document:
    """One text, and the prompt that precedes it, which is read but not learned."""

    text: str
    prompt: str = ""

    @property
    def key(self) -> bytes | None:
        """What its copies have too, however their white space is set; None where it is so short that it may recur."""
        words = f"{self.prompt} {self.text}".split()
        if len(" ".join(words)) < _SHORTEST_SHARED_CHARACTERS:
            return None
        return hashlib.sha256("".join(words).encode()).digest()


@dataclass(frozen=True)
class TextTable:
    """A source whose examples can be read in any order.

    Attributes:
        dataset: Its columns of text, as `datasets` has them.
        source: The source, with its paths as the file system knows them.
    """

    dataset: Any
    source: SourceConfig

    def read(self, start: int, stop: int) -> dict[str, list[Any]]:
        """Return some examples, column by column.

        Raises:
            DataError: They cannot be read.
        """
        try:
            examples: dict[str, list[Any]] = self.dataset[start:stop]
        except Exception as error:  # see `_load_dataset`
            raise reading_fault(error, self.source) from None
        return examples


def open_source(source: SourceConfig) -> TextTable | Iterator[Document]:
    """Return a source as a table of texts, or where it is none, its documents one after another.

    Raises:
        DataError: The source cannot be loaded or is empty, or has no such column.
    """
    if is_builtin(source):
        return (Document(text) for text in builtin_corpus.documents())
    found = located(source)
    dataset = _load_dataset(found)
    if source.streaming:
        return _read_stream(dataset, found)
    if not len(dataset):
        raise nothing_to_read(found)
    _check_columns(dataset.column_names, found)
    return TextTable(dataset.select_columns(text_columns(found)), found)


def is_builtin(source: SourceConfig) -> bool:
    """Whether a source is the built-in corpus.

    Raises:
        DataError: It is called one, but there is no such corpus.
    """
    if source.path.startswith("builtin:") and source.path != builtin_corpus.NAME:
        raise DataError(f"no built-in corpus {source.path!r}; there is {builtin_corpus.NAME!r}")
    return source.path == builtin_corpus.NAME


def text_columns(source: SourceConfig) -> list[str]:
    """Name the columns that a source is read from: its text, and its prompt where it has one."""
    return [source.text_column, *([source.prompt_column] if source.prompt_column else [])]


def document_of(texts: Sequence[Any], number: int, source: SourceConfig) -> Document | None:
    """Return the document of an example; None where it is blank, or a null that is to be skipped.

    Args:
        texts: Of the source's `text_columns`.
        number: Of the example, from 1, as errors name it.
        source: The source.

    Raises:
        DataError: It holds something else than text.
    """
    if None in texts and source.skip_null:
        return None
    for column, text in zip(text_columns(source), texts, strict=True):
        _check_text(text, column, number, source)
    text, prompt = (text.removeprefix(_BYTE_ORDER_MARK) for text in (*texts, "")[:2])
    return Document(text, prompt) if text.strip() else None


def located(source: SourceConfig) -> SourceConfig:
    """Return a source with its local paths as the file system knows them, a file with the reader that reads it.

    Raises:
        DataError: It names a local file or folder that is not there, or does not say how or what to read.
    """
    files = [source.data_files] if isinstance(source.data_files, str) else source.data_files
    home = {
        "path": _expanded(source.path),
        "data_dir": source.data_dir and _expanded(source.data_dir),
        "data_files": files and [_as_pattern(_expanded(file)) for file in files],
    }
    found = source.model_copy(update=home)
    if source.path in FILE_READERS:
        if not source.data_files and not source.data_dir:
            raise DataError(f"the source's path {source.path!r} says how files are read; data_files must say which")
        return found
    if Path(found.path).is_file():
        return _with_reader(found)
    if _looks_local(source.path) and not Path(found.path).exists():
        raise DataError(
            f"no file or folder at {Path(found.path).absolute()}, which the source's path {source.path!r} names; a "
            "pattern of files belongs in data_files, a data set of the hub is named owner/name"
        )
    return found


def _expanded(path: str) -> str:
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:  # no such user: it is found missing as it is written
        return path


def _as_pattern(file: str) -> str:
    """Return a file or pattern as a pattern in which the brackets of folders that are there mean themselves."""
    if "://" in file:
        return file
    path = Path(file).absolute()
    if path.is_file():
        return glob.escape(str(path)) if glob.has_magic(str(path)) else file
    if Path(file).is_absolute() or not glob.has_magic(str(Path.cwd())):
        return file
    return f"{glob.escape(str(Path.cwd()))}/{file}"


def _with_reader(source: SourceConfig) -> SourceConfig:
    """Turn a path that is a file into the reader of such files, and the file."""
    if source.data_files or source.data_dir:
        raise DataError(f"the source's path {source.path!r} is a file, so it takes no data_files and no data_dir")
    reader = _reader_of(source.path)
    if reader is None:
        raise DataError(
            f"the ending of {source.path!r} does not say how to read it: let it be data_files, and path one of "
            f"{', '.join(sorted(FILE_READERS))}"
        )
    options = {"sep": "\t", **source.options} if ".tsv" in Path(source.path.lower()).suffixes else source.options
    return source.model_copy(update={"path": reader, "data_files": [_as_pattern(source.path)], "options": options})


def _looks_local(path: str) -> bool:
    """Whether a path can be no name of a data set on the hub, which is `name` or `owner/name`, and no URL."""
    if "://" in path:
        return False
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or _reader_of(path) is not None


def _reader_of(path: str) -> str | None:
    """Name the reader of a file; None where the ending of its name does not say."""
    endings = [ending.lower() for ending in Path(path).suffixes]
    if endings and endings[-1] in _COMPRESSIONS:
        endings.pop()
    return _READERS.get(endings[-1]) if endings else None


def _load_dataset(source: SourceConfig) -> Any:
    import datasets

    # Its readers log what they raise as well; here it becomes one line.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    try:
        return datasets.load_dataset(
            source.path,
            source.name,
            data_dir=source.data_dir,
            data_files=source.data_files,
            split=source.split,
            revision=source.revision,
            streaming=source.streaming,
            **source.options,
        )
    except Exception as error:  # it raises whatever its readers, their parsers and the network raise
        raise reading_fault(error, source) from None


def _read_stream(dataset: Any, source: SourceConfig) -> Iterator[Document]:
    columns, number = text_columns(source), 0
    for number, example in enumerate(_examples(dataset, source), start=1):
        if number == 1:
            _check_columns(dataset.column_names or list(example), source)
        document = document_of([example.get(column) for column in columns], number, source)
        if document is not None:
            yield document
    if number == 0:
        raise nothing_to_read(source)


def _examples(dataset: Any, source: SourceConfig) -> Iterator[Any]:
    """Yield the examples of a streamed data set, which finds only here what is wrong with its files."""
    iterator = iter(dataset)
    while True:
        try:
            example = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # see `_load_dataset`
            raise reading_fault(error, source) from None
        yield example


def _check_columns(columns: Sequence[str], source: SourceConfig) -> None:
    """Hold the columns of a data set against those that are to be read.

    Raises:
        DataError: One is not there.
    """
    for column in text_columns(source):
        if column not in columns:
            raise DataError(f"data set {source_name(source)} has no column {column!r}; it has {', '.join(columns)}")


def _check_text(text: Any, column: str, number: int, source: SourceConfig) -> None:
    where = f"row {number} of data set {source_name(source)}, column {column!r}"
    if text is None:
        raise DataError(f"{where}: null, expected text; fill it in, or leave such rows out by skip_null: true")
    if not isinstance(text, str):
        raise DataError(f"{where}: {type(text).__name__}, expected text; name a column of text, or make it text")
