"""Rows from text: packing, prompts, and splits that never share a row."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from coldstill.cache.spans import Span
from coldstill.pipeline.recipe.data import DataConfig
from coldstill.pipeline.rows.building import build_rows, tokenizer_digest
from coldstill.pipeline.rows.builtin_corpus import documents
from coldstill.pipeline.rows.kept_rows import Rows
from coldstill.pipeline.runtime.errors import DataError
from coldstill.pipeline.stage_two.batches import BatchCollator, BatchColumns, StoredRow


def data_config(train: dict[str, Any], held_out: dict[str, Any], **changes: Any) -> DataConfig:
    return DataConfig.model_validate({"sequence_length": 16, **changes, "train": train, "eval": held_out})


def text_file(folder: Path, name: str, texts: list[str]) -> dict[str, Any]:
    (folder / name).write_text("\n".join(texts))
    return {"path": "text", "data_files": str(folder / name)}


def json_file(folder: Path, name: str, lines: Iterable[dict[str, Any]], **columns: str) -> dict[str, Any]:
    (folder / name).write_text("\n".join(map(json.dumps, lines)))
    return {"path": "json", "data_files": str(folder / name), **columns}


def document_ids(text: str, tokenizer: Any) -> list[int]:
    return [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


def stream_of(texts: Iterable[str], tokenizer: Any) -> list[int]:
    return [token for text in texts for token in document_ids(text, tokenizer)]


@pytest.fixture
def adding(tokenizer) -> Callable[[str], Any]:
    """Make the tokenizer add tokens of its own by a template such as `<bos> $A`; they are in its vocabulary."""

    def build(template: str, **names: str) -> Any:
        changed = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        changed.add_special_tokens(["<bos>", "<mask>"])
        tokens = {token: changed.token_to_id(token) for token in ("<bos>", "<eos>", "<mask>") if token in template}
        changed.post_processor = TemplateProcessing(single=template, special_tokens=list(tokens.items()))
        return PreTrainedTokenizerFast(tokenizer_object=changed, **names)

    return build


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


@pytest.mark.parametrize("own_is_first", [True, False])
def test_each_of_several_sources_gives_its_rows_and_train_leaves_out_what_any_of_them_has(
    tokenizer, corpus, tmp_path, own_is_first
):
    texts = list(dict.fromkeys(corpus))
    own, both = text_file(tmp_path, "own.txt", texts[:60]), [*texts[30:40], *texts[100:105]]
    named = [
        {**own, "max_rows": 4},
        {**text_file(tmp_path, "other.txt", both), "max_rows": 3, "label": "elsewhere"},
    ]
    train, held_out = build_rows(data_config(own, named if own_is_first else named[::-1]), tokenizer)
    expected = {
        "own": stream_of(texts[:60], tokenizer)[: 4 * 16],
        "elsewhere": stream_of(both, tokenizer)[: 3 * 16],
    }
    assert held_out.domains == {label: len(tokens) // 16 for label, tokens in expected.items()}
    assert list(held_out.domains) == (["own", "elsewhere"] if own_is_first else ["elsewhere", "own"])
    assert np.concatenate(held_out.tokens).tolist() == [
        token for label in held_out.domains for token in expected[label]
    ]
    # Behind eval's rows of their own source, without the ten documents that the other one has too.
    rest = stream_of([*texts[:30], *texts[40:60]], tokenizer)[4 * 16 :]
    assert np.concatenate(train.tokens).tolist() == rest[: len(rest) // 16 * 16]
    assert train.num_shared == 10


def test_a_source_among_several_that_gives_no_row_is_named(tokenizer, corpus, tmp_path):
    some, short = text_file(tmp_path, "some.txt", corpus[:9]), text_file(tmp_path, "short.txt", ["Short."])
    config = data_config(text_file(tmp_path, "train.txt", corpus[20:60]), [some, short])
    with pytest.raises(
        DataError, match=r"^data\.eval short gives no row: 1 document of 'text' \(.*short\.txt\) read, tog"
    ):
        build_rows(config, tokenizer)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_source_that_repeats_itself_shows_train_no_document_that_eval_read(tokenizer, corpus, tmp_path, streaming):
    texts = list(dict.fromkeys(corpus))[:60]
    source = {**text_file(tmp_path, "a.txt", texts * 3), "streaming": streaming}
    train, held_out = build_rows(data_config(source, {**source, "max_rows": 12}), tokenizer)
    ends = np.cumsum([len(document_ids(text, tokenizer)) for text in texts])
    num_read = int(np.searchsorted(ends, 12 * 16)) + 1
    expected = stream_of([*texts, *texts[num_read:] * 2], tokenizer)
    rows = [*held_out.tokens, *train.tokens]
    assert np.concatenate(rows).tolist() == expected[: len(expected) // 16 * 16]
    assert train.num_shared == 2 * num_read
    assert not {row.tobytes() for row in held_out.tokens} & {row.tobytes() for row in train.tokens}


@pytest.mark.parametrize("packing", [True, False])
def test_a_copy_is_known_whatever_its_white_space(tokenizer, corpus, tmp_path, packing):
    first, other, *_ = corpus
    copies = [f"{first}\n", f"  {first}", first.replace(" ", "\n"), f"\ufeff{first}", first.replace(" ", "\u00a0", 3)]
    source = json_file(tmp_path, "a.jsonl", [{"text": text} for text in (first, *copies, other)])
    config = data_config(source, {**source, "max_rows": 1}, packing=packing, sequence_length=40)
    train, _ = build_rows(config, tokenizer)
    assert train.num_shared == len(copies)
    expected = [document_ids(other, tokenizer)[:40]]
    if packing:
        stream = [*document_ids(first, tokenizer), *document_ids(other, tokenizer)]
        expected = [stream[start : start + 40] for start in range(40, len(stream) - 39, 40)]
    assert [row.tolist() for row in train.tokens] == expected


def test_a_copy_is_known_whether_its_prompt_is_apart_or_in_the_text(tokenizer, tmp_path):
    asked = [
        {"question": f"What do people call the {n} together, and since when is it so?", "text": f"The {n}."}
        for n in range(8)
    ]
    told = [{"text": f"{line['question']} {line['text']}"} for line in asked]
    held_out = json_file(tmp_path, "eval.jsonl", asked[:5], prompt_column="question")
    train = json_file(tmp_path, "train.jsonl", told)
    train_rows, _ = build_rows(data_config(train, held_out, packing=False, sequence_length=64), tokenizer)
    assert train_rows.num_shared == 5
    expected = [document_ids(line["text"], tokenizer) for line in told[5:]]
    assert [row.tolist() for row in train_rows.tokens] == expected


def test_a_train_split_leaves_out_what_the_test_split_of_its_data_set_has(tokenizer, corpus, tmp_path):
    (tmp_path / "set").mkdir()
    json_file(tmp_path / "set", "test.jsonl", [{"text": text} for text in corpus[:5]])
    json_file(tmp_path / "set", "train.jsonl", [{"text": f"{text} "} for text in corpus[3:20]])
    path = str(tmp_path / "set")
    train, held_out = build_rows(data_config({"path": path}, {"path": path, "split": "test"}, packing=False), tokenizer)
    assert [row.tolist() for row in held_out.tokens] == [document_ids(text, tokenizer)[:16] for text in corpus[:5]]
    assert [row.tolist() for row in train.tokens] == [document_ids(f"{text} ", tokenizer)[:16] for text in corpus[5:20]]
    assert train.num_shared == 2


@pytest.mark.parametrize("copies", [1, 2])
def test_the_document_that_evals_last_row_cuts_goes_on_in_train_once(tokenizer, corpus, tmp_path, copies):
    long, other = " ".join(corpus[:8]), corpus[9]
    source = text_file(tmp_path, "a.txt", [*[long] * copies, long, other])
    length, tokens = 16, document_ids(long, tokenizer)
    # Eval's last row ends within the last of the copies: what follows stands in eval already where it is not the first.
    num_rows = (len(tokens) * (copies - 1) + len(tokens) // 2) // length
    train, held_out = build_rows(data_config(source, {**source, "max_rows": num_rows}), tokenizer)
    assert np.concatenate(held_out.tokens).tolist() == (tokens * copies)[: num_rows * length]
    rest = tokens[num_rows * length :] if copies == 1 else []
    expected = [*rest, *document_ids(other, tokenizer)]
    assert np.concatenate(train.tokens).tolist() == expected[: len(expected) // length * length]
    assert train.num_shared == copies


@pytest.mark.parametrize(("packing", "counts"), [(True, (64, 64)), (False, (2, 5))])
def test_documents_are_counted_as_ever_because_selections_are_named_by_it(tokenizer, corpus, tmp_path, packing, counts):
    source = text_file(tmp_path, "a.txt", corpus[:150])
    config = data_config({**source, "max_rows": 3}, {**source, "max_rows": 2}, packing=packing)
    train, held_out = build_rows(config, tokenizer)
    assert (held_out.num_documents, train.num_documents) == counts


def test_one_document_a_row_is_cut_at_the_length_and_never_mixed(tokenizer, corpus, tmp_path):
    source = text_file(tmp_path, "a.txt", ["One.", *corpus[:20]])
    train, held_out = build_rows(
        data_config(source, {**source, "max_rows": 1}, packing=False, sequence_length=40), tokenizer
    )
    assert held_out.tokens[0].tolist() == [*tokenizer("One.")["input_ids"], tokenizer.eos_token_id]
    for row, text in zip(train.tokens, corpus[:20], strict=True):
        assert row.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id][:40]


def prompt_lengths(rows: Rows) -> list[int]:
    return [row.spans[0].stop if row.spans else 0 for row in rows.rows]


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
    for row, start, line in zip(held_out.tokens, prompt_lengths(held_out), lines, strict=False):
        prompt = tokenizer(line["question"])["input_ids"]
        assert row[:start].tolist() == prompt[:start]
        assert start == len(prompt)
    collate = BatchCollator(BatchColumns(logits={}, hidden={}), {"tokens": {"ids": "token"}})
    rows = [StoredRow({"tokens": {"ids": row.tokens}}, row.spans) for row in held_out.rows]
    # As a causal language model takes them: the ids themselves, in their own places.
    for labels, row in zip(collate(rows)["labels"], rows, strict=True):
        ids, (_, start, _) = row.arrays["tokens"]["ids"], *row.spans
        assert (labels[:start] == -100).all()
        assert labels[start : len(ids)].tolist() == ids[start:].tolist()
        assert (labels[len(ids) :] == -100).all()


@pytest.mark.parametrize("weight", [0.5, 1])
def test_a_prompt_that_weighs_something_is_a_span_and_one_that_weighs_all_is_none(tokenizer, tmp_path, weight):
    source = prompts(tmp_path, [4, 16, 5, 40])
    config = data_config(source, {**source, "max_rows": 1}, packing=False, prompt_weight=weight)
    train, held_out = build_rows(config, tokenizer)
    # Where a prompt is learned from, it is no reason to leave a document out that it fills a row.
    lengths = [4, 16, 5, 16]
    expected = [(Span(0, length, 0.5),) if weight == 0.5 else () for length in lengths]
    assert [row.spans for row in (*held_out.rows, *train.rows)] == expected
    assert [len(row.tokens) for row in train.rows] == [16, len(train.rows[1].tokens), 16]


TEMPLATES = ["<bos> $A", "$A <eos>", "<bos> $A <eos>", "<bos> <mask> $A <mask>", "$A"]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("append_eos", [True, False])
@pytest.mark.parametrize("stand_there_already", [False, True])
def test_what_a_tokenizer_adds_stands_once_at_the_ends_of_prompt_and_text(
    adding, tmp_path, template, append_eos, stand_there_already
):
    tokenizer = adding(template, bos_token="<bos>", eos_token="<eos>")
    before, behind = template.replace(" ", "").split("$A")
    lines = [("What is to be done?", "Nothing."), ("Who is to do it?", "Nobody at all.")]
    written = [
        (before + prompt, before + text + behind) if stand_there_already else (prompt, text) for prompt, text in lines
    ]
    source = json_file(
        tmp_path, "qa.jsonl", [{"prompt": prompt, "text": text} for prompt, text in written], prompt_column="prompt"
    )
    config = data_config(source, {**source, "max_rows": 1}, packing=False, append_eos=append_eos, sequence_length=64)
    end = behind if behind.endswith("<eos>") or not append_eos else f"{behind}<eos>"
    for rows, (prompt, text) in zip(reversed(build_rows(config, tokenizer)), lines, strict=True):
        parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before + prompt, text + end)]
        assert rows.tokens[0].tolist() == [*parts[0], *parts[1]]
        assert prompt_lengths(rows) == [len(parts[0])]


@pytest.mark.parametrize("template", TEMPLATES)
def test_packed_documents_begin_and_end_once_with_what_a_tokenizer_adds(adding, corpus, tmp_path, template):
    tokenizer = adding(template, bos_token="<bos>", eos_token="<eos>")
    before, behind = template.replace(" ", "").split("$A")
    end = behind if behind.endswith("<eos>") else f"{behind}<eos>"
    source = text_file(
        tmp_path, "a.txt", [before + corpus[0], corpus[1] + behind, f"{before}{corpus[2]}<eos>", corpus[3]]
    )
    train, held_out = build_rows(data_config(source, {**source, "max_rows": 1}), tokenizer)
    whole = "".join(before + text + end for text in [corpus[0], corpus[1], corpus[2], corpus[3]])
    if template == "<bos> <mask> $A <mask>":  # its own end stands behind one that the text has brought
        whole = whole.replace(f"{corpus[2]}<mask><eos>", f"{corpus[2]}<eos><mask><eos>")
    expected = tokenizer(whole, add_special_tokens=False)["input_ids"]
    rows = np.concatenate([*held_out.tokens, *train.tokens]).tolist()
    assert rows == expected[: len(rows)]
    assert len(expected) - len(rows) < 16


def test_a_text_that_is_cut_ends_as_it_is_cut(adding, tmp_path):
    tokenizer = adding("<bos> $A <eos>", bos_token="<bos>", eos_token="<eos>")
    lines = [{"prompt": f"Say {n}", "text": f"{n}, and then a good deal more than has room in a row"} for n in "ab"]
    source = json_file(tmp_path, "qa.jsonl", lines, prompt_column="prompt")
    _, held_out = build_rows(data_config(source, {**source, "max_rows": 1}, packing=False), tokenizer)
    row = held_out.tokens[0].tolist()
    assert len(row) == 16
    assert tokenizer.decode(row) == ("<bos>Say a" + lines[0]["text"])[: len(tokenizer.decode(row))]


def test_documents_without_an_end_are_noted_where_their_end_is_asked_for(adding, corpus, tmp_path):
    tokenizer = adding("<bos> $A", bos_token="<bos>")
    source = text_file(tmp_path, "a.txt", corpus[:20])
    with pytest.warns(UserWarning, match="data.append_eos has no effect: the tokenizer has no EOS token") as said:
        build_rows(data_config(source, {**source, "max_rows": 2}), tokenizer)
    assert len(said) == 1
    build_rows(data_config(source, {**source, "max_rows": 2}, append_eos=False), tokenizer)  # warnings are errors here


def prompts(folder: Path, lengths: Iterable[int]) -> dict[str, Any]:
    lines = [{"prompt": "a" + " the" * (length - 1), "text": f"Answer {n}."} for n, length in enumerate(lengths)]
    return json_file(folder, "qa.jsonl", lines, prompt_column="prompt")


def test_prompts_that_all_fill_a_row_are_counted_and_the_shortest_is_named(tokenizer, tmp_path):
    source = prompts(tmp_path, [30, 16, 20])
    message = (
        f"data.eval gives no row: 3 documents of 'json' ({tmp_path}/qa.jsonl) read, 3 with a prompt that leaves no "
        "room for a token of text: the shortest has 16 tokens, data.sequence_length is 16; raise it, or shorten the "
        "prompts"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        build_rows(data_config(source, {**source, "max_rows": 1}, packing=False), tokenizer)


def test_documents_left_out_for_their_prompts_are_noted(tokenizer, tmp_path):
    source = prompts(tmp_path, [4, 16, 5, 40])
    with pytest.warns(
        UserWarning, match=r"data\.train: 2 of 4 documents are left out, because their prompt alone fills"
    ):
        train, _ = build_rows(data_config(source, {**source, "max_rows": 1}, packing=False), tokenizer)
    assert len(train.tokens) == 1


def test_a_split_without_a_row_says_what_became_of_its_documents(tokenizer, corpus, tmp_path):
    some = text_file(tmp_path, "some.txt", corpus[:3])
    short = text_file(tmp_path, "short.txt", ["Short.", "Shorter."])
    blank = text_file(tmp_path, "blank.txt", [" ", " "])
    cases = [
        (some, some, "data.train gives no row: 0 documents of 'text' (.*some.txt) read, 3 documents or rows left out"),
        (short, some, "2 documents of 'text' (.*) read, together fewer tokens than one row of 16; use more text"),
        (blank, some, "data.train gives no row: no row of 'text' (.*blank.txt) holds text; is text_column"),
        (some, {**some, "max_rows": 99}, "3 documents of 'text' (.*) read, and eval takes all that they give"),
    ]
    for train, held_out, message in cases:
        is_one = held_out.get("max_rows")
        config = data_config(train, held_out if is_one else {**held_out, "streaming": True})
        with pytest.raises(DataError, match=message.replace("(", r"\(").replace(")", r"\)")):
            build_rows(config, tokenizer)


def test_the_built_in_corpus_is_large_and_has_each_document_once():
    found = documents()
    assert len(set(found)) == len(found) > 2000
    assert sum(map(len, found)) > 1_000_000


def test_the_built_in_corpus_is_shuffled_and_the_same_each_time():
    library = Path(json.__file__).parent
    first = documents(library)
    assert first == documents(library)
    assert first[:20] != sorted(first[:20])
    assert any("Serialize" in text for text in first), "docstrings of modules"
    assert any("statement" in text for text in first), "the language reference"


def test_tokenizers_that_differ_have_different_digests(tokenizer):
    text = tokenizer.backend_tokenizer.to_str()
    same = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text))
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text.replace('"add_prefix_space":false', '"add_prefix_space":true'))
    )
    assert tokenizer_digest(tokenizer) == tokenizer_digest(same) != tokenizer_digest(other)
