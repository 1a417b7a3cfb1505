"""Documents from files and data sets: what is read, and one line that says which file, row and column is wrong."""

import gzip
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldstill.pipeline.recipe.data import SourceConfig
from coldstill.pipeline.rows.sources import Document, TextTable, document_of, open_source, text_columns
from coldstill.pipeline.runtime.errors import DataError


def documents_of(source: SourceConfig) -> list[Document]:
    opened = open_source(source)
    if not isinstance(opened, TextTable):
        return list(opened)
    examples = opened.read(0, len(opened.dataset))
    columns = (examples[column] for column in text_columns(opened.source))
    found = [document_of(texts, number, opened.source) for number, texts in enumerate(zip(*columns, strict=True), 1)]
    return [document for document in found if document is not None]


@pytest.fixture(params=[False, True], ids=["whole", "streaming"])
def read(request: pytest.FixtureRequest) -> Callable[..., list[Document]]:
    """Read a source to its end, whole or streamed: what is said of it is the same."""

    def documents(path: Path | str, **keys: Any) -> list[Document]:
        keys = {key: str(value) if isinstance(value, Path) else value for key, value in keys.items()}
        source = SourceConfig.model_validate({"path": str(path), "streaming": request.param, **keys})
        return documents_of(source)

    return documents


def lines_of(file: Path, lines: list[dict[str, Any]]) -> Path:
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def texts(documents: list[Document]) -> list[str]:
    return [document.text for document in documents]


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_local_files_of_every_kind_load(read, tmp_path, kind):
    import pandas as pd

    frame = pd.DataFrame({"body": ["First text.", "", "Second text."]})
    file = tmp_path / f"data.{kind}"
    if kind == "json":
        frame.to_json(file, orient="records", lines=True)
    elif kind == "csv":
        frame.to_csv(file, index=False)
    else:
        frame.to_parquet(file)
    # An empty field of a CSV file is a missing value, not a text.
    found = read(kind, data_files=file, text_column="body", skip_null=kind == "csv")
    assert texts(found) == ["First text.", "Second text."]


NULLS = [{"p": "a", "text": "A."}, {"p": None, "text": "B."}, {"p": "c", "text": None}, {"p": "d", "text": "D."}]


def test_a_null_is_named_by_its_row_and_column(read, tmp_path):
    file = lines_of(tmp_path / "data.jsonl", NULLS)
    said = "null, expected text; fill it in, or leave such rows out by skip_null: true"
    source = re.escape(f"data set 'json' ({file})")
    with pytest.raises(DataError, match=f"^row 3 of {source}, column 'text': {said}$"):
        read("json", data_files=file)
    with pytest.raises(DataError, match=f"^row 2 of {source}, column 'p': {said}$"):
        read("json", data_files=file, prompt_column="p")


def test_rows_with_a_null_can_be_left_out(read, tmp_path):
    file = lines_of(tmp_path / "data.jsonl", NULLS)
    assert texts(read("json", data_files=file, skip_null=True)) == ["A.", "B.", "D."]
    found = read("json", data_files=file, prompt_column="p", skip_null=True)
    assert found == [Document("A.", "a"), Document("D.", "d")]


@pytest.mark.parametrize(("value", "kind"), [(3, "int"), (["a", "b"], "list"), ({"role": "user"}, "dict")])
def test_a_column_of_something_else_than_text_is_named(read, tmp_path, value, kind):
    file = lines_of(tmp_path / "data.jsonl", [{"text": "a", "x": value}])
    with pytest.raises(
        DataError, match=rf"^row 1 of data set 'json' \(.*\), column 'x': {kind}, expected text; name a"
    ):
        read("json", data_files=file, text_column="x")


def test_a_column_that_is_missing_is_named_with_those_that_are_there(read, tmp_path):
    file = lines_of(tmp_path / "data.jsonl", [{"text": "a", "title": "b"}])
    with pytest.raises(DataError, match=r"^data set 'json' \(.*data.jsonl\) has no column 'p'; it has text, title$"):
        read(file, prompt_column="p")


def test_a_byte_order_mark_is_no_part_of_a_text(read, tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"First of {name}.\nSecond.\n", encoding="utf-8-sig")
    found = read("text", data_files=[str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])
    assert texts(found) == ["First of a.txt.", "Second.", "First of b.txt.", "Second."]
    (tmp_path / "c.txt").write_text("\n", encoding="utf-8-sig")
    assert read("text", data_files=tmp_path / "c.txt") == []
    file = lines_of(tmp_path / "data.jsonl", [{"p": "\ufeffAsked", "text": "\ufeffAnswered"}])
    assert read(file, prompt_column="p") == [Document("Answered", "Asked")]


FILES = {
    "a.jsonl": b'{"text": "One."}\n{"text": "Two."}\n',
    "a.json": b'[{"text": "One."}, {"text": "Two."}]',
    "a.txt": b"One.\nTwo.\n",
    "a.csv": b"text,n\nOne.,1\nTwo.,2\n",
    "a.tsv": b"text\tn\nOne.\t1\nTwo.\t2\n",
    "a.jsonl.gz": gzip.compress(b'{"text": "One."}\n{"text": "Two."}\n'),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_by_its_ending(read, tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    assert texts(read(tmp_path / name)) == ["One.", "Two."]


def test_the_home_folder_may_be_a_tilde(read, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / "a.txt"
    file.write_text("One.\n")
    assert texts(read("~/folder")) == texts(read("~/folder/a.txt")) == ["One."]
    assert texts(read("text", data_files="~/folder/*.txt")) == texts(read("text", data_dir="~/folder")) == ["One."]


@pytest.mark.parametrize("named", ["absolute", "relative", "pattern", "as the path"])
def test_brackets_in_the_name_of_a_folder_mean_themselves(read, tmp_path, monkeypatch, named):
    folder = tmp_path / "runs [v1] {a}"
    folder.mkdir()
    (folder / "text [2].txt").write_text("A text.")
    monkeypatch.chdir(folder)
    files = {"absolute": folder / "text [2].txt", "relative": "text [2].txt", "pattern": "te*.txt"}
    found = read("./text [2].txt") if named == "as the path" else read("text", data_files=files[named])
    assert texts(found) == ["A text."]


@pytest.mark.parametrize(
    "path", ["./nope", "../nope", "/no/such", "~/nope", "~nobody-here/nope", "a/b/c", "nope.jsonl"]
)
def test_a_local_path_that_leads_nowhere_does_not_ask_the_hub(read, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    full = (
        path.replace("~/", f"{tmp_path}/") if path.startswith(("/", "~/")) else f"{tmp_path}/{path.removeprefix('./')}"
    )
    with pytest.raises(
        DataError, match=f"^no file or folder at {re.escape(full)}, which the source's path '{path}' na"
    ):
        read(path)


WRONG_PATHS = [
    ("a.txt", {"data_files": "b.txt"}, "the source's path '.*a.txt' is a file, so it takes no data_files and no data"),
    ("notes", {}, "the ending of '.*notes' does not say how to read it: let it be data_files, and path one of arrow, "),
]


@pytest.mark.parametrize(("name", "keys", "message"), WRONG_PATHS)
def test_a_path_that_does_not_say_what_to_read_is_one_line(read, tmp_path, name, keys, message):
    (tmp_path / name).write_text("One.\n")
    with pytest.raises(DataError, match=message):
        read(tmp_path / name, **keys)


def test_a_reader_without_files_does_not_read_the_working_folder(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.txt").write_text("Nobody asked for this.\n")
    with pytest.raises(
        DataError, match="^the source's path 'text' says how files are read; data_files must say which$"
    ):
        read("text")


LATIN = "caf\xe9".encode("latin-1")
WRONG_FILES = {
    "empty text": ("a.txt", b"", "data set 'text' (PATH) holds no text: PATH is empty"),
    "empty JSON": ("a.jsonl", b"", "data set 'json' (PATH) holds no text: PATH is empty"),
    "empty CSV": ("a.csv", b"", "data set 'csv' (PATH) holds no text: PATH is empty"),
    "no rows": ("a.csv", b"text\n", "data set 'csv' (PATH) holds no rows in split 'train'"),
    "Latin-1 text": (
        "a.txt",
        b"first\nsecond " + LATIN + b"\n",
        "cannot load data set 'text' (PATH): PATH, line 2, is not utf-8: byte 0xe9 cannot be read; name the encoding "
        "that it was written in, such as options: {encoding: latin-1}, or convert it to UTF-8",
    ),
    "Latin-1 CSV": ("a.csv", b"text\n" + LATIN, "cannot load data set 'csv' (PATH): PATH, line 2, is not utf-8"),
    "Latin-1 JSON": (
        "a.jsonl",
        b'{"text": "' + LATIN + b'"}\n',
        "cannot load data set 'json' (PATH): PATH, line 1, is not utf-8: byte 0xe9 cannot be read; name the encoding",
    ),
    "UTF-16": (
        "a.txt",
        "first\nsecond".encode("utf-16"),
        "cannot load data set 'text' (PATH): PATH is not utf-8: byte 0xff cannot be read; name the encoding that it "
        "was written in, such as options: {encoding: utf-16}",
    ),
    "a broken line": (
        "a.jsonl",
        b'{"text": "a"}\n\n{"text": "b"}\n{"text": "c\n{"text": "d"}\n',
        "cannot load data set 'json' (PATH): PATH, line 4: no JSON (Invalid control character at, column 12); mend or",
    ),
    "a broken line, compressed": (
        "a.jsonl.gz",
        gzip.compress(b'{"text": "a"}\n{"text" "b"}\n'),
        "cannot load data set 'json' (PATH): PATH, line 2: no JSON (Expecting ':' delimiter, column 9)",
    ),
    "a broken list": (
        "a.json",
        b'[{"text": "a"},\n {"text": "b"},\n {"text" "c"}]',
        "cannot load data set 'json' (PATH): PATH, line 3: no JSON (Expecting ':' delimiter, column 10)",
    ),
    "no Parquet": ("a.parquet", b"text", "cannot load data set 'parquet' (PATH): "),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_what_is_wrong_with_a_file_is_said_with_its_place_and_nowhere_else(read, tmp_path, caplog, monkeypatch, case):
    name, content, message = WRONG_FILES[case]
    monkeypatch.setattr(logging.getLogger("datasets"), "propagate", True)
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError, match="^" + re.escape(message.replace("PATH", str(file)))) as error:
        read(file)
    assert "\n" not in str(error.value)
    assert not caplog.records, "the library that reads has logged it as well"


def test_the_file_that_is_wrong_is_found_among_many(read, tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_bytes(b"text\n" * number + (LATIN if number == 2 else b"more"))
    for keys in ({"path": "text", "data_files": tmp_path / "*.txt"}, {"path": tmp_path}):
        with pytest.raises(DataError, match=rf": {tmp_path}/2.txt, line 3, is not utf-8"):
            read(**keys)


def test_the_encoding_that_the_line_advises_is_the_remedy(read, tmp_path):
    (tmp_path / "latin.txt").write_bytes(LATIN)
    (tmp_path / "wide.txt").write_text("caf\xe9", encoding="utf-16")
    for name, encoding in (("latin", "latin-1"), ("wide", "utf-16")):
        assert texts(read(tmp_path / f"{name}.txt", options={"encoding": encoding})) == ["caf\xe9"]


def test_a_pattern_that_matches_nothing_is_one_line(read, tmp_path):
    pattern = tmp_path / "*.txt"
    with pytest.raises(
        DataError, match=rf"^data set 'text' \({re.escape(str(pattern))}\): no file matches data_files$"
    ):
        read("text", data_files=pattern)


def test_a_split_that_is_not_there_is_named_with_those_that_are(read, tmp_path):
    for name in ("train.txt", "test.txt"):
        (tmp_path / name).write_text("One.\n")
    with pytest.raises(
        DataError, match=r"^cannot load data set .* split:? \"?validation\"?\. .*\['train', 'test'\]\.?$"
    ):
        read(tmp_path, split="validation")
