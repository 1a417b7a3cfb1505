"""Documents to token ids: what a tokenizer adds stands once at a document's ends, never between prompt and text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coldstill.pipeline.rows.sources import Document

_PROBE = "a b"


@dataclass(frozen=True)
class TokenisedDocument:
    """A document's token ids.

    Attributes:
        key: The document's, see `Document.key`.
        ids: What the tokenizer adds before a text, the prompt, the text, and what ends a document; uint32 [T].
        num_prompt_tokens: How many of them come before the text; 0 where there is no prompt.
    """

    key: bytes | None
    ids: np.ndarray
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

    def describe(self) -> dict[str, Any]:
        """Say what is added to texts, as JSON takes it."""
        return {"eos": self._eos, "before": self._before, "behind": self._behind}

    def tokenise(self, documents: Sequence[Document]) -> list[TokenisedDocument]:
        """Return the documents' tokens; a text may bring what is added by itself."""
        texts = [document.text for document in documents if not document.prompt]
        alone = iter(self._tokenizer(texts, verbose=False)["input_ids"] if texts else [])
        return [
            self._behind_prompt(document)
            if document.prompt
            else _tokenised(document, self._ended_once(self._begun_once(next(alone))))
            for document in documents
        ]

    def _behind_prompt(self, document: Document) -> TokenisedDocument:
        # Apart, and joined as ids: where the text begins, no token spans prompt and text.
        prompt, text = (
            self._tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
            for part in (document.prompt, document.text)
        )
        prompt = self._begun_once([*self._before, *prompt])
        text = self._begun_once([*self._before, *text])[len(self._before) :]
        return _tokenised(document, [*prompt, *self._ended_once([*text, *self._behind])], num_prompt_tokens=len(prompt))

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


def _tokenised(document: Document, ids: list[int], *, num_prompt_tokens: int = 0) -> TokenisedDocument:
    return TokenisedDocument(document.key, np.array(ids, np.uint32), num_prompt_tokens)


def _added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Find what a tokenizer adds before and behind a text, by what it makes of one."""
    plain = tokenizer(_PROBE, add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer(_PROBE, verbose=False)["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []
