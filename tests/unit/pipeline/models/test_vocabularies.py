"""Tokenizers of teacher and student are compared by what they do: ids of all tokens, and of texts."""

import copy
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from coldstill.pipeline.models import check_tokenizers
from coldstill.pipeline.runtime.errors import ModelError


def saved(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def with_tokens(tokenizer: PreTrainedTokenizerFast, *tokens: str) -> PreTrainedTokenizerFast:
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens(list(tokens), special_tokens=True)
    return changed


def test_the_same_tokenizer_passes_and_so_does_a_student_without_one(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    check_tokenizers(tokenizer, saved(tokenizer, tmp_path / "same"))
    (tmp_path / "none").mkdir()
    check_tokenizers(tokenizer, tmp_path / "none")


def test_a_token_that_only_one_has_passes_unless_its_id_is_anothers(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    check_tokenizers(with_tokens(tokenizer, "<tool>"), saved(tokenizer, tmp_path / "fewer"))
    check_tokenizers(tokenizer, saved(with_tokens(tokenizer, "<tool>"), tmp_path / "more"))
    other = saved(with_tokens(tokenizer, "<think>"), tmp_path / "other")
    with pytest.raises(ModelError, match="give tokens different ids: 384 is '<tool>' and '<think>'"):
        check_tokenizers(with_tokens(tokenizer, "<tool>"), other)


def test_tokens_added_in_another_order_are_refused_by_name(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    student = saved(with_tokens(tokenizer, "<think>", "<tool>"), tmp_path)
    with pytest.raises(ModelError, match="give tokens different ids: '<tool>' is 384 and 385; use a student of the"):
        check_tokenizers(with_tokens(tokenizer, "<tool>", "<think>"), student)


@pytest.mark.parametrize("part", ["merges", "normalizer", "pre_tokenizer"])
def test_one_vocabulary_read_in_another_way_is_refused_with_the_text(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, part: str
):
    changed = copy.deepcopy(tokenizer)
    backend = changed.backend_tokenizer
    if part == "normalizer":
        backend.normalizer = normalizers.Lowercase()
    elif part == "pre_tokenizer":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        backend.model = type(backend.model)(vocab=changed.get_vocab(), merges=[])
    with pytest.raises(ModelError, match=r"read .* as other tokens: from token"):
        check_tokenizers(tokenizer, saved(changed, tmp_path))
