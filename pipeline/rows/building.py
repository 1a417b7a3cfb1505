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
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from coldstill.cache.identity import row_id
from coldstill.cache.spans import Span
from coldstill.pipeline.recipe.data import DataConfig, SourceConfig
from coldstill.pipeline.rows.faults import source_name
from coldstill.pipeline.rows.sources import Document, load_documents
from coldstill.pipeline.rows.tokenising import DocumentTokenizer, TokenisedDocument
from coldstill.pipeline.runtime.errors import DataError

_TOKENISED_AT_ONCE = 64


@dataclass(frozen=True)
class Row:
    """One row, and what the run says of it.

    Attributes:
        tokens: Its token ids [T], uint32; they alone are its identity in a store.
        spans: What its tokens weigh in a loss, ascending and disjoint; 1 where no span covers them.
        labels: Its own labels, as many for every row of a split.
    """

    tokens: np.ndarray
    spans: tuple[Span, ...] = ()
    labels: tuple[float, ...] = ()


@dataclass
class Rows:
    """The rows of one split.

    Attributes:
        rows: The rows, in order.
        num_documents: How many documents were read for them; with one source, those of eval are among train's.
        num_shared: How many documents and rows were left out because eval has them.
        num_filled: How many documents were left out because their prompt alone fills a row.
        shortest_filling: Tokens of the shortest of these prompts; 0 where there are none.
        domains: Where the rows are of several sources: the label of each, in the order of their rows, with how many.
    """

    rows: list[Row] = field(default_factory=list)
    num_documents: int = 0
    num_shared: int = 0
    num_filled: int = 0
    shortest_filling: int = 0
    domains: dict[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> list[np.ndarray]:
        """Each row's token ids, [T], uint32."""
        return [row.tokens for row in self.rows]

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(len(row.tokens) for row in self.rows)


def build_rows(data: DataConfig, tokenizer: Any) -> tuple[Rows, Rows]:
    """Return the train rows and the eval rows of a recipe's data section.

    Raises:
        DataError: A source is missing or empty, has no such column, or gives no row.
    """
    if data.append_eos and tokenizer.eos_token_id is None:
        warnings.warn(
            "data.append_eos has no effect: the tokenizer has no EOS token, so nothing says where a document ends; "
            "name its eos_token in the teacher's tokenizer_config.json, or set data.append_eos: false",
            stacklevel=2,
        )
    train, of_sources = _read(data, tokenizer)
    held_out = _joined(of_sources, data.eval_labels)
    _drop_shared_rows(train, held_out)
    names = [f"data.eval {label}" for label in data.eval_labels] or ["data.eval"]
    for name, source, rows in (
        *zip(names, data.eval_sources, of_sources, strict=True),
        ("data.train", data.train, train),
    ):
        if not rows.rows:
            raise DataError(f"{name} gives no row: {_why_no_row(source, rows, data, is_train=rows is train)}")
        if rows.num_filled:
            warnings.warn(
                f"{name}: {rows.num_filled} of {rows.num_documents} documents are left out, because their prompt "
                f"alone fills a row of {data.sequence_length} tokens; raise data.sequence_length to keep them",
                stacklevel=2,
            )
    return train, held_out


def tokenizer_digest(tokenizer: Any) -> str:
    """Sha256 of what a tokenizer does: its whole pipeline where it is a fast one, else its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _shared_source(data: DataConfig) -> SourceConfig | None:
    """Return the source of eval rows that train reads too; None where there is none."""
    return next((source for source in data.eval_sources if source.origin() == data.train.origin()), None)


def _read(data: DataConfig, tokenizer: Any) -> tuple[Rows, list[Rows]]:
    """Return the train rows, and the eval rows of each source."""
    train, of_sources, known = Rows(), [Rows() for _ in data.eval_sources], _EvalDocuments()
    shared = _shared_source(data)
    for source, rows in zip(data.eval_sources, of_sources, strict=True):
        if source is not shared:
            documents = _count(known.remember(load_documents(source)), rows)
            _take(_cut(_tokenise(documents, data, tokenizer), data, rows), source.max_rows, rows)
    if shared is None:
        documents = _count(known.without(load_documents(data.train), train), train)
        _take(_cut(_tokenise(documents, data, tokenizer), data, train), data.train.max_rows, train)
    else:
        _read_shared(shared, of_sources[data.eval_sources.index(shared)], train, known, data, tokenizer)
    return train, of_sources


def _read_shared(
    shared: SourceConfig, held_out: Rows, train: Rows, known: "_EvalDocuments", data: DataConfig, tokenizer: Any
) -> None:
    """Cut one stream of documents in two; its counter of documents is train's, which reads to the end."""
    documents = _tokenise(_count(load_documents(data.train), train), data, tokenizer)
    rest: deque[int] = deque()
    _take(_cut(known.remember(documents), data, held_out, rest), shared.max_rows, held_out)
    held_out.num_documents = train.num_documents
    if rest and known.ends_in_a_copy:
        # The end of this document stands in eval already, with its first copy.
        rest.clear()
        train.num_shared += 1
    _take(_cut(known.without(documents, train), data, train, rest), data.train.max_rows, train)


def _joined(of_sources: Sequence[Rows], labels: Sequence[str]) -> Rows:
    """Lay the eval rows of all sources behind one another; those of a source that is no list are what they are."""
    if not labels:
        (held_out,) = of_sources
        return held_out
    return Rows(
        rows=[row for rows in of_sources for row in rows.rows],
        num_documents=sum(rows.num_documents for rows in of_sources),
        domains={label: len(rows.rows) for label, rows in zip(labels, of_sources, strict=True)},
    )


class _Keyed(Protocol):
    @property
    def key(self) -> bytes | None: ...


_Document = TypeVar("_Document", bound=_Keyed)


class _EvalDocuments:
    """The documents that eval has, by what their copies have too.

    Attributes:
        ends_in_a_copy: Whether the last one that was read had been read before.
    """

    def __init__(self) -> None:
        self._keys: set[bytes] = set()
        self.ends_in_a_copy = False

    def remember(self, documents: Iterable[_Document]) -> Iterator[_Document]:
        """Yield the documents, and note each one that is asked for."""
        for document in documents:
            self.ends_in_a_copy = document.key in self._keys
            if document.key is not None:
                self._keys.add(document.key)
            yield document

    def without(self, documents: Iterable[_Document], rows: Rows) -> Iterator[_Document]:
        """Yield the documents that were not noted."""
        for document in documents:
            if document.key in self._keys:
                rows.num_shared += 1
            else:
                yield document


def _count(documents: Iterable[Document], rows: Rows) -> Iterator[Document]:
    for document in documents:
        rows.num_documents += 1
        yield document


def _tokenise(documents: Iterable[Document], data: DataConfig, tokenizer: Any) -> Iterator[TokenisedDocument]:
    # How far this reads ahead shows in `num_documents`, and so in the names of selections: a version keeps to it.
    at_once = _TOKENISED_AT_ONCE if data.packing else 1
    return DocumentTokenizer(tokenizer, append_eos=data.append_eos).tokenise(documents, at_once=at_once)


def _cut(
    documents: Iterable[TokenisedDocument], data: DataConfig, rows: Rows, rest: deque[int] | None = None
) -> Iterator[Row]:
    """Cut documents into rows; `rest` is what packing left of the rows before."""
    if data.packing:
        return _packed_rows(documents, data.sequence_length, deque() if rest is None else rest)
    return _document_rows(documents, data, rows)


def _packed_rows(documents: Iterable[TokenisedDocument], length: int, rest: deque[int]) -> Iterator[Row]:
    """Cut one long stream of documents into rows of exactly one length; the last, shorter piece stays in `rest`."""
    # What is left may be rows already, where the last document is long.
    for ids in itertools.chain([[]], (document.ids for document in documents)):
        rest.extend(ids)
        while len(rest) >= length:
            yield Row(np.array([rest.popleft() for _ in range(length)], dtype=np.uint32))


def _document_rows(documents: Iterable[TokenisedDocument], data: DataConfig, rows: Rows) -> Iterator[Row]:
    """Yield each document a row of its own, cut at a length; one without a token to learn is left out."""
    length = data.sequence_length
    for document in documents:
        ids, num_prompt_tokens = document.ids[:length], document.num_prompt_tokens
        first = num_prompt_tokens if data.prompt_weight == 0 else 0
        if len(ids) > max(first, 1):
            yield Row(np.array(ids, dtype=np.uint32), _prompt_spans(min(num_prompt_tokens, len(ids)), data))
        elif first >= length:
            rows.num_filled += 1
            rows.shortest_filling = min(rows.shortest_filling or first, first)


def _prompt_spans(num_tokens: int, data: DataConfig) -> tuple[Span, ...]:
    return (Span(0, num_tokens, data.prompt_weight),) if num_tokens and data.prompt_weight != 1 else ()


def _take(stream: Iterator[Row], max_rows: int | None, rows: Rows) -> None:
    rows.rows.extend(itertools.islice(stream, max_rows))


def _why_no_row(source: SourceConfig, rows: Rows, data: DataConfig, *, is_train: bool) -> str:
    """Say what became of the documents of a source that gave no row, and what to do."""
    length, name = data.sequence_length, source_name(source)
    if not rows.num_documents and not rows.num_shared:
        return f"no row of {name} holds text; is text_column the right one?"
    read = f"{rows.num_documents} document{'s'[: rows.num_documents != 1]} of {name} read"
    if rows.num_shared:
        read += f", {rows.num_shared} documents or rows left out because eval has them"
    if rows.num_filled:
        return (
            f"{read}, {rows.num_filled} with a prompt that leaves no room for a token of text: the shortest has "
            f"{rows.shortest_filling} tokens, data.sequence_length is {length}; raise it, or shorten the prompts"
        )
    if is_train and _shared_source(data) is not None:
        return f"{read}, and eval takes all that they give; use more text, or lower data.eval.max_rows"
    if data.packing:
        advice = "use more text, a shorter data.sequence_length, or packing: false"
        return f"{read}, together fewer tokens than one row of {length}; {advice}"
    return f"{read}, none with a token to learn; use other text"


def _drop_shared_rows(train: Rows, held_out: Rows) -> None:
    held_out_ids = {row_id(tokens) for tokens in held_out.tokens}
    kept = [row for row in train.rows if row_id(row.tokens) not in held_out_ids]
    train.num_shared += len(train.rows) - len(kept)
    train.rows = kept
