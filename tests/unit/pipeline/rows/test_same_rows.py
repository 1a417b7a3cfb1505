"""Rows stay what they are, token by token, and so do the counts that selections are named by."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from coldstill.pipeline.recipe.data import DataConfig
from coldstill.pipeline.rows.building import build_rows
from coldstill.pipeline.rows.kept_rows import Rows

NUM_DOCUMENTS = 300


@pytest.fixture(scope="module")
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, whatever release of Python and of its documentation this is."""
    words = {word: index for index, word in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def text(number: int) -> str:
    """Texts of 4 to 200 characters; some recur, and some are blank."""
    if number % 41 == 7:
        return "   "
    number %= 250
    return f"{number}: " + "a stone in the river turns round, and " * (number * 7 % 6) + "on" * (number % 5)


def lines() -> list[dict[str, str]]:
    asked = "What is it that turns? "
    return [{"text": text(number), "asked": asked * (number * 5 % 7)} for number in range(NUM_DOCUMENTS)]


def digest_of(rows: Rows) -> str:
    hasher = hashlib.sha256()
    for row in rows.rows:
        hasher.update(repr((row.tokens.tolist(), [tuple(span) for span in row.spans], list(row.labels))).encode())
    return hasher.hexdigest()[:12]


def said_of(rows: Rows) -> tuple[Any, ...]:
    counted = rows.counts
    counts = (counted.num_documents, counted.num_shared, counted.num_filled, counted.shortest_filling)
    return (len(rows.tokens), rows.num_tokens, *counts, *rows.domains.items(), digest_of(rows))


PINNED = {
    "one source": ((445, 7120, 292, 1315, 0, 0, "f35a1dd3c8e0"), (70, 1120, 64, 0, 0, 0, "baff797013c5")),
    "few rows": ((85, 1360, 64, 15, 0, 0, "bf9a540bed62"), (9, 144, 64, 0, 0, 0, "33dbcf99bde9")),
    "two sources": ((552, 8832, 240, 917, 0, 0, "f5583898d088"), (517, 8272, 78, 0, 0, 0, "b1f1dad8645c")),
    "two sources, few rows": ((299, 4784, 128, 243, 0, 0, "998457b95be3"), (40, 640, 64, 0, 0, 0, "10e74908ac4c")),
    "long rows": ((26, 25974, 292, 13, 0, 0, "875069dc837c"), (2, 1998, 64, 0, 0, 0, "b85523d45da0")),
    "repeated": ((507, 8112, 116, 200, 0, 0, "60e401cbdfc0"), (33, 528, 64, 0, 0, 0, "9acf83995566")),
    "a document a row": ((233, 21852, 292, 29, 0, 0, "51538e96dcd8"), (30, 2771, 30, 0, 0, 0, "cd06fbe5d697")),
    "a document a row, few rows": ((90, 8380, 90, 0, 0, 0, "a8f253b792a5"), (7, 720, 7, 0, 0, 0, "4ccfe1e70b6c")),
    "prompts": ((262, 33475, 292, 0, 0, 0, "1a1788209436"), (30, 3838, 30, 0, 0, 0, "37acd6773bc5")),
    "prompts that weigh": ((214, 27299, 222, 78, 0, 0, "f0b3ff004bb0"), (78, 10014, 78, 0, 0, 0, "d1e0590b90ef")),
    "several": (
        (287, 4592, 292, 705, 0, 0, "573472146ae8"),
        (60, 960, 192, 0, 0, 0, ("b", 20), ("a", 30), ("c", 10), "d5009b4e5c57"),
    ),
    "several others": (
        (253, 23542, 265, 39, 0, 0, "da39bd027d1e"),
        (30, 2928, 30, 0, 0, 0, ("b", 20), ("c", 10), "412753f27012"),
    ),
    "prompts that fill": ((104, 5728, 292, 0, 140, 69, "845c83bb8b51"), (20, 1052, 48, 0, 28, 69, "2f68cb0465d9")),
}


def cases(folder: Path) -> dict[str, dict[str, Any]]:
    written = lines()
    for name, some in (("a", written), ("b", written[100:180]), ("c", written[:60] * 2)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    a, b, c = ({"path": str(folder / f"{name}.jsonl")} for name in "abc")
    asked = {"prompt_column": "asked"}
    short = {"sequence_length": 16}
    apart = {"packing": False, "sequence_length": 150}
    return {
        "one source": {**short, "train": a, "eval": {**a, "max_rows": 70}},
        "few rows": {**short, "train": {**a, "max_rows": 100}, "eval": {**a, "max_rows": 9}},
        "two sources": {**short, "train": a, "eval": b},
        "two sources, few rows": {**short, "train": {**a, "max_rows": 500}, "eval": {**b, "max_rows": 40}},
        "long rows": {"sequence_length": 999, "append_eos": False, "train": a, "eval": {**a, "max_rows": 2}},
        "repeated": {**short, "train": {**c, "streaming": True}, "eval": {**c, "streaming": True, "max_rows": 33}},
        "a document a row": {**apart, "train": a, "eval": {**a, "max_rows": 30}},
        "a document a row, few rows": {**apart, "train": {**a, "max_rows": 90}, "eval": {**b, "max_rows": 7}},
        "prompts": {**apart, "train": {**a, **asked}, "eval": {**a, **asked, "max_rows": 30}},
        "prompts that weigh": {**apart, "prompt_weight": 0.5, "train": {**a, **asked}, "eval": {**b, **asked}},
        "several": {**short, "train": a, "eval": [{**b, "max_rows": 20}, {**a, "max_rows": 30}, {**c, "max_rows": 10}]},
        "several others": {**apart, "train": a, "eval": [{**b, "max_rows": 20}, {**c, "max_rows": 10}]},
        "prompts that fill": {
            "packing": False,
            "sequence_length": 60,
            "train": {**a, **asked},
            "eval": {**a, **asked, "max_rows": 20},
        },
    }


# What every version made of these texts: a run that goes on, and a store that is extended, need the same rows.
@pytest.mark.parametrize("case", PINNED)
@pytest.mark.filterwarnings("ignore:data")
def test_rows_and_counts_are_what_they_ever_were(case: str, bytes_tokenizer, tmp_path: Path):
    train, held_out = build_rows(DataConfig.model_validate(cases(tmp_path)[case]), bytes_tokenizer)
    assert (said_of(train), said_of(held_out)) == PINNED[case]


@pytest.mark.parametrize("case", PINNED)
@pytest.mark.filterwarnings("ignore:data")
def test_rows_that_several_processes_make_are_those_that_one_makes(
    case: str, bytes_tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Each span of documents is divided among processes, but for the first ones.
    monkeypatch.setattr("coldstill.pipeline.rows.tokenised_sources.PARALLEL_DOCUMENTS", 100)
    train, held_out = build_rows(DataConfig.model_validate(cases(tmp_path)[case]), bytes_tokenizer)
    assert (said_of(train), said_of(held_out)) == PINNED[case]
