"""Text to rows of token ids: deterministic, no model.

Knows documents, tokenizers and splits; knows nothing of stores. Train and eval never share a row: where both read one
source, eval takes its first rows and train goes on behind them; where they read two, train leaves out every document
and every row that eval has.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cache.errors import DataError
from cache.identity import row_id
from pipeline import builtin_corpus
from pipeline.config import DataConfig, SourceConfig

_TOKENISED_AT_ONCE = 64
# Headings and other short lines recur in any text; sharing one is no leak.
_SHORTEST_SHARED_CHARACTERS = 64


@dataclass(frozen=True)
class Document:
    """One text, and the prompt that precedes it, which is read but not learned."""

    text: str
    prompt: str = ""


@dataclass
class Rows:
    """The rows of one split.

    Attributes:
        tokens: Each row's token ids, shape [T], uint32.
        loss_starts: For each row the first token that counts in a loss; those before it are a prompt.
        num_documents: How many documents were read for them.
        num_shared: How many documents and rows were left out because eval has them.
    """

    tokens: list[np.ndarray] = field(default_factory=list)
    loss_starts: list[int] = field(default_factory=list)
    num_documents: int = 0
    num_shared: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(map(len, self.tokens))


def build_rows(data: DataConfig, tokenizer: Any) -> tuple[Rows, Rows]:
    """Give the train rows and the eval rows of a recipe's data section.

    Raises:
        DataError: A source is missing or empty, has no such column, or gives no row.
    """
    held_out, train = Rows(), Rows()
    if data.train.origin() == data.eval.origin():
        # One stream of rows: its counter of documents is train's, which reads to the end.
        stream = _row_stream(load_documents(data.train), data, tokenizer, train)
        _take(stream, data.eval.max_rows, held_out)
        held_out.num_documents = train.num_documents
        _take(stream, data.train.max_rows, train)
    else:
        seen: set[bytes] = set()
        documents = _remember(load_documents(data.eval), seen)
        _take(_row_stream(documents, data, tokenizer, held_out), data.eval.max_rows, held_out)
        documents = _without(load_documents(data.train), seen, train)
        _take(_row_stream(documents, data, tokenizer, train), data.train.max_rows, train)
    _drop_shared_rows(train, held_out)
    for split, rows, source in (("eval", held_out, data.eval), ("train", train, data.train)):
        if not rows.tokens:
            raise DataError(
                f"data.{split} gives no row: {rows.num_documents} documents of {source.path} read, sequence_length "
                f"{data.sequence_length}; use more text, a shorter sequence_length, or packing: false"
            )
    return train, held_out


def load_documents(source: SourceConfig) -> Iterator[Document]:
    """Give a source's documents one after another, empty ones left out.

    Raises:
        DataError: The source cannot be loaded, or has no such column.
    """
    if source.path == builtin_corpus.NAME:
        return (Document(text) for text in builtin_corpus.documents())
    if source.path.startswith("builtin:"):
        raise DataError(f"no built-in corpus {source.path!r}; there is {builtin_corpus.NAME!r}")
    return _read_columns(_load_dataset(source), source)


def tokenizer_digest(tokenizer: Any) -> str:
    """Sha256 of what a tokenizer does: its whole pipeline where it is a fast one, else its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _load_dataset(source: SourceConfig) -> Any:
    import datasets

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
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"cannot load data set {source.path!r}: {reason}") from None


def _read_columns(dataset: Any, source: SourceConfig) -> Iterator[Document]:
    wanted = [source.text_column, *([source.prompt_column] if source.prompt_column else [])]
    columns = dataset.column_names
    for column in wanted:
        if columns is not None and column not in columns:
            raise DataError(f"data set {source.path!r} has no column {column!r}; it has {', '.join(columns)}")
    for example in dataset:
        text = example[source.text_column]
        prompt = example[source.prompt_column] if source.prompt_column else ""
        if not isinstance(text, str) or not isinstance(prompt, str):
            raise DataError(
                f"column {source.text_column!r} of {source.path!r} holds {type(text).__name__}, expected text"
            )
        if text.strip():
            yield Document(text, prompt)


def _row_stream(
    documents: Iterator[Document], data: DataConfig, tokenizer: Any, rows: Rows
) -> Iterator[tuple[np.ndarray, int]]:
    make = _packed_rows if data.packing else _document_rows
    return make(_count(documents, rows), data, tokenizer)


def _take(stream: Iterator[tuple[np.ndarray, int]], max_rows: int | None, rows: Rows) -> Rows:
    for tokens, loss_start in itertools.islice(stream, max_rows):
        rows.tokens.append(tokens)
        rows.loss_starts.append(loss_start)
    return rows


def _count(documents: Iterable[Document], rows: Rows) -> Iterator[Document]:
    for document in documents:
        rows.num_documents += 1
        yield document


def _without(documents: Iterable[Document], seen: Set[bytes], rows: Rows) -> Iterator[Document]:
    for document in documents:
        if _shared_key(document) in seen:
            rows.num_shared += 1
        else:
            yield document


def _packed_rows(documents: Iterable[Document], data: DataConfig, tokenizer: Any) -> Iterator[tuple[np.ndarray, int]]:
    """Cut one long stream of documents into rows of exactly `sequence_length`; the last, shorter piece is left out."""
    length = data.sequence_length
    pending: list[int] = []
    for ids in _tokenise(documents, data, tokenizer):
        pending += ids
        for start in range(0, len(pending) - length + 1, length):
            yield np.array(pending[start : start + length], dtype=np.uint32), 0
        del pending[: len(pending) // length * length]


def _document_rows(documents: Iterable[Document], data: DataConfig, tokenizer: Any) -> Iterator[tuple[np.ndarray, int]]:
    """Give each document a row of its own, cut at `sequence_length`; one without a token to learn is left out."""
    for document in documents:
        prompt_ids = tokenizer(document.prompt, verbose=False)["input_ids"] if document.prompt else []
        text_ids = tokenizer(document.text, add_special_tokens=not document.prompt, verbose=False)["input_ids"]
        ids = [*prompt_ids, *_with_eos(text_ids, data, tokenizer)][: data.sequence_length]
        loss_start = max(len(prompt_ids), 1)
        if len(ids) > loss_start:
            yield np.array(ids, dtype=np.uint32), loss_start if document.prompt else 0


def _tokenise(documents: Iterable[Document], data: DataConfig, tokenizer: Any) -> Iterator[list[int]]:
    iterator = iter(documents)
    while batch := list(itertools.islice(iterator, _TOKENISED_AT_ONCE)):
        for ids in tokenizer([document.text for document in batch], verbose=False)["input_ids"]:
            yield _with_eos(ids, data, tokenizer)


def _with_eos(ids: list[int], data: DataConfig, tokenizer: Any) -> list[int]:
    eos = tokenizer.eos_token_id
    if data.append_eos and eos is not None and (not ids or ids[-1] != eos):
        return [*ids, eos]
    return ids


def _shared_key(document: Document) -> bytes | None:
    if len(document.text) < _SHORTEST_SHARED_CHARACTERS:
        return None
    return hashlib.sha256(f"{document.prompt}\0{document.text}".encode()).digest()


def _remember(documents: Iterable[Document], seen: set[bytes]) -> Iterator[Document]:
    for document in documents:
        key = _shared_key(document)
        if key is not None:
            seen.add(key)
        yield document


def _drop_shared_rows(train: Rows, held_out: Rows) -> None:
    held_out_ids = {row_id(tokens) for tokens in held_out.tokens}
    kept = [index for index, tokens in enumerate(train.tokens) if row_id(tokens) not in held_out_ids]
    train.num_shared += len(train.tokens) - len(kept)
    train.tokens = [train.tokens[index] for index in kept]
    train.loss_starts = [train.loss_starts[index] for index in kept]
