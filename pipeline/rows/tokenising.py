"""Documents to token ids: what a tokenizer adds stands once at a document's ends, never between prompt and text."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from coldstill.pipeline.rows.sources import Document

_PROBE = "a b"


@dataclass(frozen=True)
class TokenisedDocument:
    """A document's token ids.

    Attributes:
        key: The document's, see `Document.key`.
        ids: What the tokenizer adds before a text, the prompt, the text, and what ends a document.
        num_prompt_tokens: How many of them come before the text; 0 where there is no prompt.
    """

    key: bytes | None
    ids: list[int]
    num_prompt_tokens: int


class DocumentTokenizer:
    """A tokenizer, and the tokens that it adds by itself before and behind a text.

    Args:
        tokenizer: It turns text into ids.
        append_eos: Whether each document ends with the end-of-text token, where there is one.
    """

    def __init__(self, tokenizer: Any, *, append_eos: bool) -> None:
        self._tokenizer = tokenizer
        self._eos: int | None = tokenizer.eos_token_id if append_eos else None
        self._before, self._behind = _added_tokens(tokenizer)

    def tokenise(self, documents: Iterable[Document], *, at_once: int) -> Iterator[TokenisedDocument]:
        """Yield the documents' tokens, reading so many documents at once; a text may bring what is added by itself."""
        iterator = iter(documents)
        while batch := list(itertools.islice(iterator, at_once)):
            texts = [document.text for document in batch if not document.prompt]
            alone = iter(self._tokenizer(texts, verbose=False)["input_ids"] if texts else [])
            for document in batch:
                if document.prompt:
                    yield self._behind_prompt(document)
                else:
                    ids = self._begun_once(next(alone))
                    yield TokenisedDocument(document.key, self._ended_once(ids), 0)

    def _behind_prompt(self, document: Document) -> TokenisedDocument:
        # Apart, and joined as ids: where the text begins, no token spans prompt and text.
        prompt, text = (
            self._tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
            for part in (document.prompt, document.text)
        )
        prompt = self._begun_once([*self._before, *prompt])
        text = self._begun_once([*self._before, *text])[len(self._before) :]
        return TokenisedDocument(
            document.key, [*prompt, *self._ended_once([*text, *self._behind])], num_prompt_tokens=len(prompt)
        )

    def _begun_once(self, ids: Sequence[int]) -> list[int]:
        """Leave out what is added before a text where the text begins with it already."""
        added, start = self._before, 0
        while added and list(ids[start + len(added) : start + 2 * len(added)]) == added:
            start += len(added)
        return list(ids[start:])

    def _ended_once(self, ids: Sequence[int]) -> list[int]:
        """Leave out what is added behind a text where the text ends with it already; close it with the EOS."""
        added, end = self._behind, len(ids)
        while added and list(ids[max(end - 2 * len(added), 0) : end - len(added)]) == added:
            end -= len(added)
        if self._eos is None or (end > 0 and ids[end - 1] == self._eos):
            return list(ids[:end])
        return [*ids[:end], self._eos]


def _added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Find what a tokenizer adds before and behind a text, by what it makes of one."""
    plain = tokenizer(_PROBE, add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer(_PROBE, verbose=False)["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []
