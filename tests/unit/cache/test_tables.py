"""Folders of Parquet files: named by their bytes, read as a union, folded without a moment in which anything lacks."""

import hashlib
import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pyarrow as pa
import pytest

from coldstill.cache.errors import CorruptError
from coldstill.cache.local_objects import LocalObjects
from coldstill.cache.tables import fetch, fold, open_parquet, parse_table, read_folder, write_table

SCHEMA = pa.schema([("name", pa.dictionary(pa.int32(), pa.string())), ("number", pa.int32())])


def table_of(*numbers: int) -> pa.Table:
    names = pa.array([f"n{number % 2}" for number in numbers], pa.string()).dictionary_encode()
    return pa.table({"name": names, "number": pa.array(numbers, pa.int32())}, schema=SCHEMA)


def parse(name: str, file: IO[bytes]) -> list[int]:
    return parse_table(name, file, SCHEMA)["number"].to_pylist()


def table_in(name: str, data: bytes) -> pa.Table:
    return parse_table(name, io.BytesIO(data), SCHEMA)


def all_numbers(objects: LocalObjects) -> list[int]:
    return sorted(itertools.chain.from_iterable(read_folder(objects, "folder", parse).values()))


@pytest.fixture
def objects(tmp_path: Path) -> LocalObjects:
    return LocalObjects(str(tmp_path))


def test_a_table_is_named_by_the_sha256_of_its_bytes_and_reads_back(objects: LocalObjects):
    name = write_table(objects, "folder", table_of(1, 2, 3))
    data = objects.read(f"folder/{name}")
    assert name == f"{hashlib.sha256(data).hexdigest()[:16]}.parquet"
    assert table_in(name, data).to_pylist() == table_of(1, 2, 3).to_pylist()
    assert table_in(name, data).schema.equals(SCHEMA)


def test_the_same_table_is_one_file_and_another_is_another(objects: LocalObjects):
    first = write_table(objects, "folder", table_of(1, 2))
    assert write_table(objects, "folder", table_of(1, 2)) == first
    assert write_table(objects, "folder", table_of(2, 1)) != first
    assert len(objects.files("folder")) == 2


def test_every_flipped_byte_and_every_cut_of_a_file_is_refused_by_its_name(objects: LocalObjects):
    name = write_table(objects, "folder", table_of(1, 2, 3))
    data = objects.read(f"folder/{name}")
    for position in range(len(data)):
        flipped = data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
        for damaged in (flipped, data[:position], data + data[: position + 1]):
            with pytest.raises(ValueError, match="its content is not what it is named by"):
                table_in(name, damaged)


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1PAR1", b"<html>404 not found</html>"])
def test_what_is_no_parquet_file_is_a_value_error(data: bytes):
    with pytest.raises(ValueError, match="."), open_parquet(io.BytesIO(data), SCHEMA):
        pass


def test_a_table_of_other_columns_is_refused(objects: LocalObjects):
    name = write_table(objects, "folder", table_of(1).rename_columns(["name", "count"]))
    with pytest.raises(ValueError, match=r"its columns are \['name', 'count'\], expected \['name', 'number'\]"):
        table_in(name, objects.read(f"folder/{name}"))


def test_a_folder_reads_as_all_of_its_files(objects: LocalObjects):
    assert read_folder(objects, "folder", parse) == {}
    names = [write_table(objects, "folder", table_of(*numbers)) for numbers in ([1, 2], [3])]
    assert read_folder(objects, "folder", parse) == {names[0]: [1, 2], names[1]: [3]}


def test_a_damaged_file_of_a_folder_is_an_error_by_name_or_is_left_out(objects: LocalObjects):
    whole, bad = (write_table(objects, "folder", table_of(number)) for number in (1, 2))
    objects.write(f"folder/{bad}", b"PAR1")
    objects.write("folder/other.txt", b"what is no file of a table at all")
    with pytest.raises(CorruptError, match=rf"folder/({bad}|other\.txt) of store .* is corrupt: .*; run: coldstill"):
        read_folder(objects, "folder", parse)
    damaged: list[str] = []
    assert read_folder(objects, "folder", parse, damaged=damaged) == {whole: [1]}
    assert sorted(damaged) == sorted([bad, "other.txt"])


def test_a_fold_publishes_the_union_before_it_removes_what_it_came_from(objects: LocalObjects, monkeypatch):
    names = [write_table(objects, "folder", table_of(number)) for number in (1, 2)]
    seen = []

    def seen_remove(self: LocalObjects, name: str, remove: Callable = LocalObjects.remove) -> None:
        seen.append(all_numbers(self))
        remove(self, name)

    monkeypatch.setattr(LocalObjects, "remove", seen_remove)
    union = fold(objects, "folder", [table_of(1, 2)], names)
    assert seen == [[1, 1, 2, 2], [1, 2, 2]]
    assert objects.files("folder") == [union]


def test_folding_a_file_into_itself_keeps_it(objects: LocalObjects):
    name = write_table(objects, "folder", table_of(1, 2))
    other = write_table(objects, "folder", table_of(1))
    assert fold(objects, "folder", [table_of(1, 2)], [name, other]) == name
    assert read_folder(objects, "folder", parse) == {name: [1, 2]}


class FoldedWhileListed(LocalObjects):
    """Objects whose files are folded right after each of the first listings."""

    def __init__(self, root: str, *, num_folds: int) -> None:
        super().__init__(root)
        self.num_folds = num_folds

    def files(self, folder: str) -> list[str]:
        names = super().files(folder)
        if self.num_folds and len(names) > 1:
            self.num_folds -= 1
            numbers = sorted(number for name in names for number in self.numbers(folder, name))
            fold(self, folder, [table_of(*numbers)], names)
            write_table(self, folder, table_of(100 + self.num_folds))
        return names

    def numbers(self, folder: str, name: str) -> list[int]:
        with fetch(self, f"{folder}/{name}") as file:
            return parse(name, file)


@pytest.mark.parametrize("num_folds", [1, 4])
def test_a_folder_that_is_folded_while_it_is_read_is_read_again(tmp_path: Path, num_folds: int):
    objects = FoldedWhileListed(str(tmp_path), num_folds=num_folds)
    for number in (1, 2, 3):
        write_table(objects, "folder", table_of(number))
    numbers = all_numbers(objects)
    assert numbers == [1, 2, 3, *range(100, 100 + num_folds)]


def test_a_folder_that_never_rests_is_an_error(tmp_path: Path):
    objects = FoldedWhileListed(str(tmp_path), num_folds=1000)
    for number in (1, 2):
        write_table(objects, "folder", table_of(number))
    with pytest.raises(CorruptError, match="folder changes faster than it can be read; try again"):
        read_folder(objects, "folder", parse)
