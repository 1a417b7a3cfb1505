"""Rows are made once for the same data, kept whole or not at all, and read by slices."""

import gc
import json
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import datasets
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from coldstill.cache.objects import open_objects
from coldstill.pipeline.precompute import precompute
from coldstill.pipeline.recipe.data import DataConfig
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.rows.building import build_rows
from coldstill.pipeline.rows.kept_rows import Rows, RowsPlace
from coldstill.pipeline.runtime.errors import DataError
from coldstill.pipeline.stage_one.dry_run import dry_run

Files = Callable[[str | Path], dict[str, bytes]]


class Counting(PreTrainedTokenizerFast):
    """A tokenizer that counts the documents that it is given."""

    num_documents = 0

    def __call__(self, text: Any = None, *arguments: Any, **options: Any) -> Any:
        Counting.num_documents += len(text) if isinstance(text, list) else 0
        return super().__call__(text, *arguments, **options)


@pytest.fixture
def counting(tokenizer: Any) -> Counting:
    Counting.num_documents = 0
    return Counting(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every data set that is loaded from now on."""
    names: list[str] = []
    load = datasets.load_dataset

    def counted(path: str, *arguments: Any, **options: Any) -> Any:
        names.append(path)
        return load(path, *arguments, **options)

    monkeypatch.setattr(datasets, "load_dataset", counted)
    return names


@pytest.fixture
def data(tmp_path: Path, corpus: list[str]) -> dict[str, Any]:
    source = text_file(tmp_path / "text.txt", corpus)
    return {"sequence_length": 16, "train": source, "eval": {**source, "max_rows": 6}}


def text_file(file: Path, texts: Sequence[str]) -> dict[str, Any]:
    file.write_text("\n".join(texts))
    return {"path": "text", "data_files": str(file)}


@pytest.fixture
def make(tmp_path: Path, tokenizer: Any) -> Callable[..., tuple[Rows, Rows]]:
    """Make rows, and keep them."""

    def made(data: dict[str, Any], with_tokenizer: Any = tokenizer, **options: Any) -> tuple[Rows, Rows]:
        return build_rows(
            DataConfig.model_validate(data), with_tokenizer, keep_in=RowsPlace(tmp_path / "kept"), **options
        )

    return made


@pytest.fixture
def tree() -> Files:
    """Give every file below a folder, hidden ones too: relative path -> bytes."""

    def files(folder: str | Path) -> dict[str, bytes]:
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}

    return files


def tokens_of(splits: Sequence[Rows]) -> list[list[list[int]]]:
    return [[row.tolist() for row in rows.tokens] for rows in splits]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_same_data_is_read_and_tokenised_once(make, data, counting, loaded, streaming: bool):
    for source in (data["train"], data["eval"]):
        source["streaming"] = streaming
    first = make(data, counting)
    num_documents = counting.num_documents
    assert num_documents == first[0].num_documents > 100
    assert len(loaded) == 1
    again = make(data, counting)
    assert (counting.num_documents, len(loaded)) == (num_documents, 1)
    assert tokens_of(again) == tokens_of(first)
    assert [rows.counts for rows in again] == [rows.counts for rows in first]


def test_a_second_precompute_reads_no_document(write_recipe, loaded, tree: Files):
    recipe = load_recipe(write_recipe())
    assert precompute(recipe, show_progress=False).computed_tokens > 0
    before, num_loaded = tree(recipe.cache), len(loaded)
    assert num_loaded > 0
    again = precompute(recipe, show_progress=False)
    assert (again.computed_tokens, len(loaded)) == (0, num_loaded)
    assert tree(recipe.cache) == before
    dry_run(recipe)
    assert len(loaded) == num_loaded


def test_the_same_bytes_under_another_date_are_the_same_data_and_one_other_byte_is_not(
    make, data, tmp_path: Path, loaded
):
    first = make(data)
    os.utime(tmp_path / "text.txt", (1, 1))
    make(data)
    assert len(loaded) == 1
    file = tmp_path / "text.txt"
    file.write_bytes(file.read_bytes().replace(b"e", b"o", 1))
    other = make(data)
    assert len(loaded) == 2
    assert tokens_of(other) != tokens_of(first)


def test_a_stream_is_known_by_the_size_and_date_of_its_files(make, data, tmp_path: Path, loaded):
    for source in (data["train"], data["eval"]):
        source["streaming"] = True
    first = tokens_of(make(data))
    file = tmp_path / "text.txt"
    date = file.stat().st_mtime_ns
    file.write_bytes(file.read_bytes().replace(b"e", b"o", 1))
    os.utime(file, ns=(date, date))
    assert tokens_of(make(data)) == first, "it was read whole"
    os.utime(file, (1, 1))
    assert tokens_of(make(data)) != first
    assert len(loaded) == 2


def test_rows_that_nobody_keeps_are_there_as_long_as_something_of_them_is_read(data, tokenizer):
    tokens = build_rows(DataConfig.model_validate(data), tokenizer)[0].tokens
    gc.collect()
    assert tokens[0].shape == tokens[-1].shape == (16,)


def test_what_decides_rows_is_part_of_what_they_are_kept_by(make, data, tokenizer, tmp_path: Path):
    changes = [{}, {"sequence_length": 17}, {"packing": False}, {"append_eos": False}]
    without_end = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="the")
    for change in changes:
        make({**data, **change})
    make(data, without_end)
    make({**data, "eval": {**data["eval"], "max_rows": 7}})
    assert len(list((tmp_path / "kept").iterdir())) == len(changes) + 2


def test_prompts_that_weigh_otherwise_are_other_rows(make, tmp_path: Path):
    lines = [{"question": f"What is {n}?", "text": f"It is {n}, of course."} for n in range(9)]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = {"path": str(tmp_path / "qa.jsonl"), "prompt_column": "question"}
    data = {"sequence_length": 32, "packing": False, "train": source, "eval": {**source, "max_rows": 2}}
    for weight in (0.0, 0.5, 0.0, 0.5):
        train, _ = make({**data, "prompt_weight": weight})
        assert {span.weight for row in train.rows for span in row.spans} == {weight}


def test_what_was_to_be_noted_of_rows_is_noted_each_time(make, tmp_path: Path):
    lines = [{"prompt": "a" + " the" * (length - 1), "text": "Answer."} for length in (4, 16, 5, 40)]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = {"path": str(tmp_path / "qa.jsonl"), "prompt_column": "prompt"}
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"data\.train: 2 of 4 documents are left out"):
            make({"sequence_length": 16, "packing": False, "train": source, "eval": {**source, "max_rows": 1}})


@pytest.mark.parametrize("file", ["train.arrow", "eval.arrow", "rows.json", "checksums.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_damaged_rows_are_made_anew(make, data, tmp_path: Path, tree: Files, file: str, damage: str):
    first = tokens_of(make(data))
    before = tree(tmp_path / "kept")
    (folder,) = (tmp_path / "kept").iterdir()
    content = (folder / file).read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    if damage == "gone":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(flipped if damage == "flipped" else content[:middle])
    assert tokens_of(make(data)) == first
    assert tree(tmp_path / "kept") == before


def test_a_dry_run_finds_rows_and_keeps_none(make, data, tmp_path: Path, loaded):
    unkept = tokens_of(make(data, is_dry=True))
    assert not (tmp_path / "kept").exists()
    assert tokens_of(make(data)) == unkept
    num_loaded = len(loaded)
    assert tokens_of(make(data, is_dry=True)) == unkept
    assert len(loaded) == num_loaded


def test_data_that_gives_no_row_keeps_nothing(make, tmp_path: Path, corpus):
    short, text = text_file(tmp_path / "short.txt", ["Short."]), text_file(tmp_path / "text.txt", corpus)
    for train, held_out in ((short, text), (text, short)):
        with pytest.raises(DataError, match="gives no row"):
            make({"sequence_length": 99, "train": train, "eval": held_out})
    assert not list((tmp_path / "kept").iterdir())


class Dying(PreTrainedTokenizerFast):
    """A tokenizer whose process is killed when it has been given so many documents."""

    left = 0

    def __call__(self, text: Any = None, *arguments: Any, **options: Any) -> Any:
        Dying.left -= len(text) if isinstance(text, list) else 0
        if Dying.left < 0:
            os.kill(os.getpid(), 9)
        return super().__call__(text, *arguments, **options)


@pytest.mark.parametrize("num_documents", [0, 64, 200])
def test_rows_whose_making_is_killed_leave_nothing_behind_the_next(
    make, data, tmp_path: Path, tokenizer, tree: Files, num_documents: int
):
    dying = Dying(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<eos>")
    datasets.load_dataset("text", data_files=data["train"]["data_files"], split="train")
    child = os.fork()
    if not child:
        Dying.left = num_documents
        make(data, dying)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == 9
    left = [path.name for path in (tmp_path / "kept").iterdir()]
    assert all(name.startswith(".") for name in left), "half-made rows look like whole ones"
    assert left
    # Whichever rows are made next.
    make({**data, "sequence_length": 24})
    make(data)
    assert len(list((tmp_path / "kept").iterdir())) == 2
    assert not [name for name in tree(tmp_path / "kept") if name.startswith(".")]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
def test_what_is_wrong_with_a_document_is_said_when_its_turn_comes(
    tokenizer, tmp_path: Path, corpus, monkeypatch: pytest.MonkeyPatch, streaming: bool, parallel: bool
):
    if parallel:
        monkeypatch.setattr("coldstill.pipeline.rows.tokenised_sources.PARALLEL_DOCUMENTS", 64)
    lines = [{"text": text} for text in corpus[:280]]
    lines[230] = lines[250] = {"text": None}
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = {"path": str(tmp_path / "a.jsonl"), "streaming": streaming}
    data = {"sequence_length": 16, "packing": False, "train": source, "eval": {**source, "max_rows": 2}}
    with pytest.raises(DataError, match=r"^row 231 of data set .*: null, expected text"):
        build_rows(DataConfig.model_validate(data), tokenizer)
    few = {**data, "train": {**source, "max_rows": 200}}
    train, _ = build_rows(DataConfig.model_validate(few), tokenizer)
    assert len(train) + train.num_shared == 200


def test_rows_are_read_in_any_order_and_by_other_processes(make, data):
    train, _ = make(data)
    tokens = [row.tolist() for row in train.tokens]
    assert len(tokens) == len(train) > 200
    assert train.num_tokens == 16 * len(tokens)
    chosen = np.random.default_rng(0).integers(0, len(tokens), 50)
    assert [row.tolist() for row in map(train.tokens.__getitem__, chosen.tolist())] == [
        tokens[index] for index in chosen
    ]
    assert [row.tolist() for row in train.tokens[-3:]] == tokens[-3:]
    assert train.tokens[-1].tolist() == tokens[-1]
    for beyond in (len(tokens), -len(tokens) - 1):
        with pytest.raises(IndexError, match=f"row {beyond} of {len(tokens)}"):
            train.tokens[beyond]
    sent = pickle.loads(pickle.dumps(train))
    assert [row.tolist() for row in sent.tokens] == tokens
    child = os.fork()
    if not child:
        os._exit(0 if [row.tolist() for row in train.tokens] == tokens else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_rows_that_one_machine_made_for_a_root_on_object_storage_are_copied_by_the_others(
    data, tmp_path: Path, tokenizer, loaded, tree: Files
):
    root = f"memory://{uuid4().hex}"
    config = DataConfig.model_validate(data)
    first, second, third = (RowsPlace(tmp_path / name, root) for name in ("first", "second", "third"))
    made = tokens_of(build_rows(config, tokenizer, keep_in=first))
    assert len(loaded) == 1
    assert tokens_of(build_rows(config, tokenizer, keep_in=second)) == made
    assert tokens_of(build_rows(config, tokenizer, keep_in=third, is_dry=True)) == made
    assert len(loaded) == 1
    assert tree(second.folder) == tree(first.folder)
    assert not third.folder.exists()
    # What is damaged there is made anew by who meets it.
    objects = open_objects(root)
    (name,) = [name for name in objects.sizes("rows") if name.endswith("train.arrow")]
    objects.write(name, objects.read(name)[:-9])
    assert tokens_of(build_rows(config, tokenizer, keep_in=third)) == made
    assert len(loaded) == 2
