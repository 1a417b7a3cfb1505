"""A source's documents with their tokens, in order: tokenised by as many processes as there are cores.

Documents are read a span at a time, short ones first: who wants few rows has few documents read. What is wrong with one
of them is said when its turn comes. A large span is a file for a moment, so that memory does not grow with it.
"""

import contextlib
import itertools
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from tqdm import tqdm

from coldstill.pipeline.recipe.data import SourceConfig
from coldstill.pipeline.rows.faults import reading_fault, source_name
from coldstill.pipeline.rows.sources import Document, TextTable, document_of, open_source, text_columns
from coldstill.pipeline.rows.tokenising import DocumentTokenizer, TokenisedDocument
from coldstill.pipeline.runtime.errors import DataError

# Documents of the first span; each has twice as many as the one before, up to so many bytes of text.
_FIRST_SPAN = 64
_SPAN_BYTES = 256 << 20
# Of a source that is no table a span lies in memory.
_STREAM_SPAN_CHARACTERS = 16 << 20
# What a document takes there beside its text.
_DOCUMENT_CHARACTERS = 256
# So many are worth that processes are started for them.
PARALLEL_DOCUMENTS = 4096
_TOKENISED_AT_ONCE = 64
_SHOWN_AFTER_S = 5.0

_TOKENISED = pa.schema(
    [
        ("key", pa.binary()),
        ("ids", pa.list_(pa.uint32())),
        ("num_prompt_tokens", pa.int32()),
        # What is wrong with the document that should stand here.
        ("fault", pa.string()),
    ]
)


def tokenised_documents(
    source: SourceConfig, tokenizer: DocumentTokenizer, *, scratch: Path, show_progress: bool = False
) -> Iterator[TokenisedDocument]:
    """Yield the documents of a source, empty ones left out.

    Args:
        source: The source.
        tokenizer: It turns them into tokens.
        scratch: A folder that large spans may lie in for a moment.
        show_progress: Whether to show a progress bar, where it takes a while.

    Raises:
        DataError: The source cannot be loaded or is empty, has no such column, or holds something else than text.
    """
    opened = open_source(source)
    spans = (
        _spans_of_table(opened, tokenizer, scratch)
        if isinstance(opened, TextTable)
        else _spans_of_stream(opened, tokenizer, scratch)
    )
    total = len(opened.dataset) if isinstance(opened, TextTable) and source.max_rows is None else None
    with tqdm(
        total=total,
        unit="doc",
        unit_scale=True,
        desc=f"tokenise {source_name(source)}",
        disable=not show_progress,
        delay=_SHOWN_AFTER_S,
    ) as bar:
        for num_documents, tables in spans:
            for table in tables:
                yield from _documents_of(table)
            bar.update(num_documents)


_Span = tuple[int, Iterator[pa.Table]]


def _spans_of_table(table: TextTable, tokenizer: DocumentTokenizer, scratch: Path) -> Iterator[_Span]:
    num_documents = len(table.dataset)
    mean_bytes = max(table.dataset.data.nbytes / num_documents, 1)
    work = _Work(tokenizer, table.source)
    start, size = 0, _FIRST_SPAN
    while start < num_documents:
        stop = min(start + size, num_documents)
        if stop - start < PARALLEL_DOCUMENTS:
            yield stop - start, _tokenised_here(table, start, stop, work)
        else:
            yield stop - start, _tokenised_by_all(table, start, stop, work, scratch)
        start, size = stop, max(min(2 * size, int(_SPAN_BYTES / mean_bytes)), _FIRST_SPAN)


def _tokenised_here(table: TextTable, start: int, stop: int, work: "_Work") -> Iterator[pa.Table]:
    for first in range(start, stop, _TOKENISED_AT_ONCE):
        last = min(first + _TOKENISED_AT_ONCE, stop)
        yield work(table.read(first, last), range(first, last))


def _tokenised_by_all(table: TextTable, start: int, stop: int, work: "_Work", scratch: Path) -> Iterator[pa.Table]:
    span = table.dataset.select(range(start, stop))
    return _mapped(span, _From(work, start), table.source, scratch)


def _spans_of_stream(documents: Iterator[Document], tokenizer: DocumentTokenizer, scratch: Path) -> Iterator[_Span]:
    """Yield spans of documents that come one by one; an error in reading is raised behind what was read before it."""
    size = _FIRST_SPAN
    while True:
        span, fault = _next_span(documents, size)
        if span:
            yield len(span), _tokenised_stream(span, tokenizer, scratch)
        if fault is not None:
            raise fault
        if not span:
            return
        size *= 2


def _next_span(documents: Iterator[Document], size: int) -> tuple[list[Document], DataError | None]:
    span: list[Document] = []
    num_characters = 0
    try:
        for document in itertools.islice(documents, size):
            span.append(document)
            num_characters += len(document.text) + len(document.prompt) + _DOCUMENT_CHARACTERS
            if num_characters >= _STREAM_SPAN_CHARACTERS:
                break
    except DataError as error:
        return span, error
    return span, None


def _tokenised_stream(span: Sequence[Document], tokenizer: DocumentTokenizer, scratch: Path) -> Iterator[pa.Table]:
    if len(span) < PARALLEL_DOCUMENTS:
        for first in range(0, len(span), _TOKENISED_AT_ONCE):
            yield _table_of(tokenizer.tokenise(span[first : first + _TOKENISED_AT_ONCE]))
        return
    import datasets

    texts = {"text": [document.text for document in span], "prompt": [document.prompt for document in span]}
    yield from _mapped(datasets.Dataset.from_dict(texts), _OfTexts(tokenizer), None, scratch)


@dataclass(frozen=True)
class _Work:
    """Tokenises examples of a source; goes to other processes."""

    tokenizer: DocumentTokenizer
    source: SourceConfig

    def __call__(self, examples: dict[str, list[Any]], numbers: Sequence[int]) -> pa.Table:
        """Return the documents of some examples, up to the first in which something is wrong.

        Args:
            examples: Their columns.
            numbers: Which they are of the source, from 0.
        """
        documents, fault = [], None
        columns = (examples[column] for column in text_columns(self.source))
        for number, *texts in zip(numbers, *columns, strict=True):
            try:
                document = document_of(texts, number + 1, self.source)
            except DataError as error:
                fault = str(error)
                break
            if document is not None:
                documents.append(document)
        return _table_of(self.tokenizer.tokenise(documents), fault)


@dataclass(frozen=True)
class _From:
    """Does the same work on a part of a source that begins at some example."""

    work: _Work
    start: int

    def __call__(self, examples: dict[str, list[Any]], numbers: Sequence[int]) -> pa.Table:
        return self.work(examples, [self.start + number for number in numbers])


@dataclass(frozen=True)
class _OfTexts:
    """Tokenises documents that were read already."""

    tokenizer: DocumentTokenizer

    def __call__(self, examples: dict[str, list[str]], _numbers: Sequence[int]) -> pa.Table:
        documents = [Document(*texts) for texts in zip(examples["text"], examples["prompt"], strict=True)]
        return _table_of(self.tokenizer.tokenise(documents))


def _table_of(documents: Sequence[TokenisedDocument], fault: str | None = None) -> pa.Table:
    ids = [document.ids for document in documents] + ([] if fault is None else [np.empty(0, np.uint32)])
    offsets = np.concatenate([[0], np.cumsum([len(of_one) for of_one in ids])]).astype(np.int32)
    nothing = [] if fault is None else [None]
    columns = {
        "key": pa.array([document.key for document in documents] + nothing, pa.binary()),
        "ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate([np.empty(0, np.uint32), *ids]))),
        "num_prompt_tokens": pa.array([document.num_prompt_tokens for document in documents] + [0] * len(nothing)),
        "fault": pa.array([None] * len(documents) + ([] if fault is None else [fault]), pa.string()),
    }
    return pa.table(columns).cast(_TOKENISED)


def _documents_of(table: pa.Table) -> Iterator[TokenisedDocument]:
    lists = table["ids"].combine_chunks()
    ids, offsets = lists.values.to_numpy(), lists.offsets.to_pylist()
    columns = (table[name].to_pylist() for name in ("key", "num_prompt_tokens", "fault"))
    for start, stop, key, num_prompt_tokens, fault in zip(offsets, offsets[1:], *columns, strict=False):
        if fault is not None:
            raise DataError(fault)
        yield TokenisedDocument(key, ids[start:stop], num_prompt_tokens)


def _mapped(
    dataset: Any, work: Callable[..., pa.Table], source: SourceConfig | None, scratch: Path
) -> Iterator[pa.Table]:
    """Do some work on all of a data set, by as many processes as there are cores, and yield what it gives in order."""
    import datasets

    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        was_shown = not datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            with _quiet_workers():
                mapped = dataset.map(
                    work,
                    with_indices=True,
                    batched=True,
                    batch_size=_TOKENISED_AT_ONCE,
                    writer_batch_size=_TOKENISED_AT_ONCE,
                    remove_columns=dataset.column_names,
                    features=datasets.Features.from_arrow_schema(_TOKENISED),
                    # At least one: what this process reads itself of a file that is mapped stays in its memory.
                    num_proc=min(_num_cores(), len(dataset)),
                    cache_file_name=str(Path(folder) / "tokens.arrow"),
                    new_fingerprint="tokens",
                )
        except Exception as error:  # of a process that was killed, or of a data set that cannot be read
            if source is None:
                raise
            raise reading_fault(error, source) from None
        finally:
            if was_shown:
                datasets.enable_progress_bars()
        files = [entry["filename"] for entry in mapped.cache_files]
        del mapped
        for file in files:
            # Not mapped either.
            with pa.OSFile(file) as opened, pa.ipc.open_stream(opened) as batches:
                for batch in batches:
                    yield pa.Table.from_batches([batch])


def _num_cores() -> int:
    return len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _quiet_workers() -> Iterator[None]:
    """Let processes that are started now end without a word when they are told to; this one does what it did."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()
    before: dict[int, Any] = {}

    def end(number: int, frame: Any) -> None:
        handler = before[number]
        if os.getpid() != process:
            os._exit(128 + number)
        if callable(handler):
            handler(number, frame)
        elif handler == signal.SIG_DFL:
            signal.signal(number, handler)
            signal.raise_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if handler not in (signal.SIG_IGN, None):
            before[number] = handler
            signal.signal(number, end)
    try:
        yield
    finally:
        for changed, handler in before.items():
            signal.signal(changed, handler)
