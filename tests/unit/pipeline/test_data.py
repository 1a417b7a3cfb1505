"""Rows from text: packing, prompts, and splits that never share a row."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.errors import DataError
from pipeline.batches import BatchCollator, BatchColumns, EpochOrder, StoredRow
from pipeline.config import DataConfig
from pipeline.data import build_rows, load_documents, tokenizer_digest


def data_config(train: dict[str, Any], held_out: dict[str, Any], **changes: Any) -> DataConfig:
    return DataConfig.model_validate({"sequence_length": 16, **changes, "train": train, "eval": held_out})


def text_file(folder: Path, name: str, texts: list[str]) -> dict[str, Any]:
    (folder / name).write_text("\n".join(texts))
    return {"path": "text", "data_files": str(folder / name)}


def test_packed_rows_are_one_stream_cut_into_equal_pieces(tokenizer, corpus, tmp_path):
    source = text_file(tmp_path, "a.txt", corpus)
    train, held_out = build_rows(data_config({**source, "max_rows": 30}, {**source, "max_rows": 5}), tokenizer)
    stream = [token for text in corpus for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    rows = [*held_out.tokens, *train.tokens]
    assert [len(row) for row in rows] == [16] * 35
    assert np.concatenate(rows).tolist() == stream[: 35 * 16]
    assert rows[0].dtype == np.uint32


def test_one_source_gives_eval_its_first_rows_and_train_the_next(tokenizer, corpus, tmp_path):
    source = text_file(tmp_path, "a.txt", corpus)
    train, held_out = build_rows(data_config(source, {**source, "max_rows": 5}), tokenizer)
    assert len(held_out.tokens) == 5
    assert len(train.tokens) > 100
    assert not {row.tobytes() for row in train.tokens} & {row.tobytes() for row in held_out.tokens}


def test_two_sources_that_overlap_leave_train_without_evals_documents(tokenizer, corpus, tmp_path):
    held_out_source = text_file(tmp_path, "eval.txt", corpus[:20])
    train_source = text_file(tmp_path, "train.txt", corpus[10:60])
    train, _ = build_rows(data_config(train_source, held_out_source), tokenizer)
    assert train.num_shared == 10
    alone, _ = build_rows(data_config(text_file(tmp_path, "b.txt", corpus[20:60]), held_out_source), tokenizer)
    assert [row.tolist() for row in train.tokens] == [row.tolist() for row in alone.tokens]


def test_one_document_a_row_is_cut_at_the_length_and_never_mixed(tokenizer, corpus, tmp_path):
    source = text_file(tmp_path, "a.txt", ["One.", *corpus[:20]])
    train, held_out = build_rows(
        data_config(source, {**source, "max_rows": 1}, packing=False, sequence_length=40), tokenizer
    )
    assert held_out.tokens[0].tolist() == [*tokenizer("One.")["input_ids"], tokenizer.eos_token_id]
    for row, text in zip(train.tokens, corpus[:20], strict=True):
        assert row.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id][:40]


def test_a_prompt_is_read_but_not_learned(tokenizer, tmp_path):
    lines = [{"question": f"What is {n} and {n}?", "answer": f"It is {2 * n}, of course."} for n in range(6)]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = {
        "path": "json",
        "data_files": str(tmp_path / "qa.jsonl"),
        "text_column": "answer",
        "prompt_column": "question",
    }
    train, held_out = build_rows(data_config(source, {**source, "max_rows": 2}, packing=False), tokenizer)
    assert len(train.tokens) == 4
    for row, start, line in zip(held_out.tokens, held_out.loss_starts, lines, strict=False):
        prompt = tokenizer(line["question"])["input_ids"]
        assert row[:start].tolist() == prompt[:start]
        assert start == len(prompt)
    collate = BatchCollator(BatchColumns(logits={}, hidden={}), {"tokens": {"ids": "token"}})
    rows = [
        StoredRow({"tokens": {"ids": tokens}}, start)
        for tokens, start in zip(held_out.tokens, held_out.loss_starts, strict=True)
    ]
    # As a causal language model takes them: the ids themselves, in their own places.
    for labels, row in zip(collate(rows)["labels"], rows, strict=True):
        ids, start = row.arrays["tokens"]["ids"], row.loss_start
        assert (labels[:start] == -100).all()
        assert labels[start : len(ids)].tolist() == ids[start:].tolist()
        assert (labels[len(ids) :] == -100).all()


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_local_files_of_every_kind_load(tmp_path, kind):
    import pandas as pd

    frame = pd.DataFrame({"body": ["First text.", "", "Second text."]})
    file = tmp_path / f"data.{kind}"
    if kind == "json":
        frame.to_json(file, orient="records", lines=True)
    elif kind == "csv":
        frame.fillna("").to_csv(file, index=False)
    else:
        frame.to_parquet(file)
    config = data_config(
        {"path": kind, "data_files": str(file), "text_column": "body"}, {"path": "builtin:python-docs", "max_rows": 1}
    )
    if kind == "csv":  # an empty field of a CSV file is a missing value, not a text
        with pytest.raises(DataError, match="column 'body' of 'csv' holds NoneType, expected text"):
            list(load_documents(config.train))
    else:
        assert [document.text for document in load_documents(config.train)] == ["First text.", "Second text."]


def test_the_built_in_corpus_is_large_shuffled_and_the_same_each_time():
    from pipeline.builtin_corpus import documents

    first, second = documents(), documents()
    assert first == second
    assert len(set(first)) == len(first) > 2000
    assert sum(map(len, first)) > 1_000_000


def test_tokenizers_that_differ_have_different_digests(tokenizer):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    text = tokenizer.backend_tokenizer.to_str()
    same = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text))
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text.replace('"add_prefix_space":false', '"add_prefix_space":true'))
    )
    assert tokenizer_digest(tokenizer) == tokenizer_digest(same) != tokenizer_digest(other)


def test_the_order_of_rows_is_a_function_of_seed_and_epoch():
    order = EpochOrder(50, seed=1)
    first = list(order)
    order.set_epoch(1)
    second = list(order)
    order.set_epoch(0)
    assert list(order) == first != second
    assert sorted(first) == sorted(second) == list(range(50))
    assert list(EpochOrder(50, seed=2)) != first
