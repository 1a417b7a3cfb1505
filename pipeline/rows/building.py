"""Text to rows of token ids: deterministic, no model.

Knows documents, tokenizers and splits; knows nothing of stores. Train and eval never share a row: where both read one
source, eval takes its first rows and train goes on behind them; where they read two, they begin each at its own
beginning. In both, train leaves out every document that eval has read, and every row that it has. The one document
that eval's last row cuts in two is in both, its beginning there and its end here, no token of it twice. Where eval has
several sources, each is read so, and train leaves out what any of them has.
"""

import hashlib
import itertools
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from coldstill.cache.row_lines import id_array
from coldstill.cache.spans import Span
from coldstill.pipeline.recipe.data import DataConfig, SourceConfig
from coldstill.pipeline.rows.faults import source_name
from coldstill.pipeline.rows.kept_rows import EVAL_FILE, TRAIN_FILE, RowCounts, Rows, RowsPlace, make_once
from coldstill.pipeline.rows.row_files import Row, RowFile, RowWriter, batch_rows
from coldstill.pipeline.rows.tokenised_sources import tokenised_documents
from coldstill.pipeline.rows.tokenising import DocumentTokenizer, TokenisedDocument
from coldstill.pipeline.runtime.errors import DataError

# How many documents of packed rows are counted at once. It shows in `num_documents`, and so in the names of
# selections: a version keeps to it.
_COUNTED_AT_ONCE = 64


def build_rows(
    data: DataConfig,
    tokenizer: Any,
    *,
    keep_in: RowsPlace | None = None,
    is_dry: bool = False,
    show_progress: bool = False,
) -> tuple[Rows, Rows]:
    """Return the train rows and the eval rows of a recipe's data section.

    Args:
        data: The data section.
        tokenizer: Its tokenizer.
        keep_in: Where rows are kept by content, so that those that were made before are found; None to make them for
            this process alone.
        is_dry: Whether to keep nothing that is not kept yet.
        show_progress: Whether to show progress bars, where it takes a while.

    Raises:
        DataError: A source is missing or empty, has no such column, or gives no row.
    """
    if data.append_eos and tokenizer.eos_token_id is None:
        warnings.warn(
            "data.append_eos has no effect: the tokenizer has no EOS token, so nothing says where a document ends; "
            "name its eos_token in the teacher's tokenizer_config.json, or set data.append_eos: false",
            stacklevel=2,
        )

    def build(folder: Path) -> tuple[RowCounts, list[RowCounts]]:
        return _Building(data, tokenizer, folder, show_progress=show_progress).build()

    digest = tokenizer_digest(tokenizer)
    made = make_once(data, tokenizer, digest, build, keep_in=keep_in, is_dry=is_dry, show_progress=show_progress)
    for name, _, counts in _named(data, made.train.counts, made.of_sources):
        if counts.num_filled:
            warnings.warn(
                f"{name}: {counts.num_filled} of {counts.num_documents} documents are left out, because their prompt "
                f"alone fills a row of {data.sequence_length} tokens; raise data.sequence_length to keep them",
                stacklevel=2,
            )
    return made.train, made.held_out


def tokenizer_digest(tokenizer: Any) -> str:
    """Sha256 of what a tokenizer does: its whole pipeline where it is a fast one, else its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _named(
    data: DataConfig, train: RowCounts, of_sources: list[RowCounts]
) -> Iterator[tuple[str, SourceConfig, RowCounts]]:
    """Yield each source, what errors call it, and what was counted of it."""
    names = [f"data.eval {label}" for label in data.eval_labels] or ["data.eval"]
    yield from zip(names, data.eval_sources, of_sources, strict=True)
    yield "data.train", data.train, train


def _shared_source(data: DataConfig) -> SourceConfig | None:
    """Return the source of eval rows that train reads too; None where there is none."""
    return next((source for source in data.eval_sources if source.origin() == data.train.origin()), None)


class _Building:
    """Makes the rows of a data section in a folder.

    Args:
        data: The data section.
        tokenizer: Its tokenizer.
        folder: The folder.
        show_progress: Whether to show progress bars, where it takes a while.
    """

    def __init__(self, data: DataConfig, tokenizer: Any, folder: Path, *, show_progress: bool) -> None:
        self._data = data
        self._tokenizer = DocumentTokenizer(tokenizer, append_eos=data.append_eos)
        self._folder = folder
        self._show_progress = show_progress
        self._known = _EvalDocuments()
        self._train = RowCounts()
        self._of_sources = [RowCounts() for _ in data.eval_sources]

    def build(self) -> tuple[RowCounts, list[RowCounts]]:
        """Return what was counted of train and of each source of eval rows.

        Raises:
            DataError: A source is missing or empty, has no such column, or gives no row.
        """
        data, shared = self._data, _shared_source(self._data)
        for index, source in enumerate(data.eval_sources):
            if source is not shared:
                documents = self._counted(self._known.remember(self._documents(source)), self._of_sources[index])
                self._write(self._eval_file(index), source.max_rows, documents, self._of_sources[index])
        if shared is None:
            self._join()
            documents = self._counted(self._known.without(self._documents(data.train), self._train), self._train)
            self._write_train(documents, _Rest())
        else:
            self._build_shared(data.eval_sources.index(shared), shared)
        for name, source, counts in _named(data, self._train, self._of_sources):
            if not counts.num_rows:
                is_train = counts is self._train
                raise DataError(f"{name} gives no row: {_why_no_row(source, counts, data, is_train=is_train)}")
        return self._train, self._of_sources

    def _build_shared(self, index: int, shared: SourceConfig) -> None:
        """Cut one stream of documents in two; its counter of documents is train's, which reads to the end."""
        held_out, train, rest = self._of_sources[index], self._train, _Rest()
        documents = self._counted(self._documents(self._data.train), train)
        self._write(self._eval_file(index), shared.max_rows, self._known.remember(documents), held_out, rest)
        held_out.num_documents = train.num_documents
        self._join()
        if rest.num_tokens and self._known.ends_in_a_copy:
            # The end of this document stands in eval already, with its first copy.
            rest = _Rest()
            train.num_shared += 1
        self._write_train(self._known.without(documents, train), rest)

    def _documents(self, source: SourceConfig) -> Iterator[TokenisedDocument]:
        return tokenised_documents(source, self._tokenizer, scratch=self._folder, show_progress=self._show_progress)

    def _counted(self, documents: Iterable[TokenisedDocument], counts: RowCounts) -> Iterator[TokenisedDocument]:
        """Yield documents, and count so many at once as are read at once."""
        at_once, iterator = _COUNTED_AT_ONCE if self._data.packing else 1, iter(documents)
        while some := list(itertools.islice(iterator, at_once)):
            counts.num_documents += len(some)
            yield from some

    def _write_train(self, documents: Iterator[TokenisedDocument], rest: "_Rest") -> None:
        held_out = self._rows(EVAL_FILE, sum(counts.num_rows for counts in self._of_sources))
        without = {row for places in held_out.places() for row in id_array(places["row"]).to_pylist()}
        self._write(TRAIN_FILE, self._data.train.max_rows, documents, self._train, rest, without=without)

    def _write(
        self,
        name: str,
        max_rows: int | None,
        documents: Iterator[TokenisedDocument],
        counts: RowCounts,
        rest: "_Rest | None" = None,
        *,
        without: Iterable[bytes] = (),
    ) -> None:
        """Cut documents into rows, and write these; `rest` is what packing left of the rows before, and leaves now."""
        writer = self._writer(name, frozenset(without))
        if self._data.packing:
            _pack(writer, documents, self._data.sequence_length, max_rows, _Rest() if rest is None else rest)
        else:
            for row in itertools.islice(_document_rows(documents, self._data, counts), max_rows):
                writer.append(row)
        writer.close()
        counts.num_rows, counts.num_tokens, counts.largest_id = writer.num_rows, writer.num_tokens, writer.largest_id
        counts.num_shared += writer.num_left_out

    def _writer(self, name: str, without: frozenset[bytes] = frozenset()) -> RowWriter:
        return RowWriter(self._folder / name, batch_rows(self._data.sequence_length), without=without)

    def _rows(self, name: str, num_rows: int) -> RowFile:
        path, num_batch_rows = self._folder / name, batch_rows(self._data.sequence_length)
        return RowFile(path, num_rows=num_rows, num_batch_rows=num_batch_rows)

    def _eval_file(self, index: int) -> str:
        return EVAL_FILE if len(self._of_sources) == 1 else f"eval-{index}.arrow"

    def _join(self) -> None:
        """Lay the eval rows of all sources behind one another."""
        if len(self._of_sources) == 1:
            return
        joined = self._writer(EVAL_FILE)
        for index, counts in enumerate(self._of_sources):
            of_source = self._rows(self._eval_file(index), counts.num_rows)
            for place in range(counts.num_rows):
                joined.append(of_source.row(place))
            of_source.path.unlink()
        joined.close()


class _EvalDocuments:
    """The documents that eval has, by what their copies have too.

    Attributes:
        ends_in_a_copy: Whether the last one that was read had been read before.
    """

    def __init__(self) -> None:
        self._keys: set[bytes] = set()
        self.ends_in_a_copy = False

    def remember(self, documents: Iterable[TokenisedDocument]) -> Iterator[TokenisedDocument]:
        """Yield the documents, and note each one that is asked for."""
        for document in documents:
            self.ends_in_a_copy = document.key in self._keys
            if document.key is not None:
                self._keys.add(document.key)
            yield document

    def without(self, documents: Iterable[TokenisedDocument], counts: RowCounts) -> Iterator[TokenisedDocument]:
        """Yield the documents that were not noted."""
        for document in documents:
            if document.key in self._keys:
                counts.num_shared += 1
            else:
                yield document


@dataclass
class _Rest:
    """Tokens that are no row yet.

    Attributes:
        parts: Of documents, in order.
        num_tokens: How many they are.
    """

    parts: list[np.ndarray] = field(default_factory=list)
    num_tokens: int = 0

    def add(self, tokens: np.ndarray) -> None:
        self.parts.append(tokens)
        self.num_tokens += len(tokens)

    def take(self, num_tokens: int) -> np.ndarray:
        """Return the first tokens, and keep the others."""
        tokens = np.concatenate(self.parts)
        self.parts, self.num_tokens = [tokens[num_tokens:]], self.num_tokens - num_tokens
        return tokens[:num_tokens]


def _pack(
    writer: RowWriter, documents: Iterator[TokenisedDocument], length: int, max_rows: int | None, rest: _Rest
) -> None:
    """Cut one long stream of documents into rows of exactly one length; the last, shorter piece stays in `rest`."""
    num_left = max_rows
    while True:
        # What is left may be rows already, where the last document is long.
        num_rows = rest.num_tokens // length if num_left is None else min(rest.num_tokens // length, num_left)
        if num_rows:
            writer.append_equal(rest.take(num_rows * length).reshape(num_rows, length))
            num_left = None if num_left is None else num_left - num_rows
        document = next(documents, None) if num_left != 0 else None
        if document is None:
            return
        rest.add(document.ids)


def _document_rows(documents: Iterable[TokenisedDocument], data: DataConfig, counts: RowCounts) -> Iterator[Row]:
    """Yield each document a row of its own, cut at a length; one without a token to learn is left out."""
    length = data.sequence_length
    for document in documents:
        ids, num_prompt_tokens = document.ids[:length], document.num_prompt_tokens
        first = num_prompt_tokens if data.prompt_weight == 0 else 0
        if len(ids) > max(first, 1):
            yield Row(ids, _prompt_spans(min(num_prompt_tokens, len(ids)), data))
        elif first >= length:
            counts.num_filled += 1
            counts.shortest_filling = min(counts.shortest_filling or first, first)


def _prompt_spans(num_tokens: int, data: DataConfig) -> tuple[Span, ...]:
    return (Span(0, num_tokens, data.prompt_weight),) if num_tokens and data.prompt_weight != 1 else ()


def _why_no_row(source: SourceConfig, counts: RowCounts, data: DataConfig, *, is_train: bool) -> str:
    """Say what became of the documents of a source that gave no row, and what to do."""
    length, name = data.sequence_length, source_name(source)
    if not counts.num_documents and not counts.num_shared:
        return f"no row of {name} holds text; is text_column the right one?"
    read = f"{counts.num_documents} document{'s'[: counts.num_documents != 1]} of {name} read"
    if counts.num_shared:
        read += f", {counts.num_shared} documents or rows left out because eval has them"
    if counts.num_filled:
        return (
            f"{read}, {counts.num_filled} with a prompt that leaves no room for a token of text: the shortest has "
            f"{counts.shortest_filling} tokens, data.sequence_length is {length}; raise it, or shorten the prompts"
        )
    if is_train and _shared_source(data) is not None:
        return f"{read}, and eval takes all that they give; use more text, or lower data.eval.max_rows"
    if data.packing:
        advice = "use more text, a shorter data.sequence_length, or packing: false"
        return f"{read}, together fewer tokens than one row of {length}; {advice}"
    return f"{read}, none with a token to learn; use other text"
