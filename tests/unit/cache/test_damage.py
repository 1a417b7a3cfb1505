"""Flipped bytes in every kind of file, and publishing that fails when the record is already out."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from store_rows import found_rows

from coldstill.cache.arrays import read_column
from coldstill.cache.columns import ArraySpec, Column
from coldstill.cache.errors import CorruptError, StoreError
from coldstill.cache.identity import row_id
from coldstill.cache.manifest import Manifest
from coldstill.cache.rows import read_rows
from coldstill.cache.selections import read_selection, write_selection
from coldstill.cache.spans import Span
from coldstill.cache.store import open_store
from coldstill.cache.writer import write_column

COLUMN = Column("hidden/1", {"values": ArraySpec("float32", (2,))})
ARRAYS = {"values": np.ones((4, 2), "f4")}
SIZES = {"num_tokens": 4, "num_rows": 1}


def flipped(file: Path, *, step: int = 1) -> Iterator[int]:
    """Damage one byte after another, each in one of two ways, and leave the file as it was."""
    good = file.read_bytes()
    for number, index in enumerate(range(0, len(good), step)):
        file.write_bytes(good[:index] + bytes([good[index] ^ (1, 0x80)[number % 2]]) + good[index + 1 :])
        yield index
    file.write_bytes(good)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_publishing_that_raises_after_the_record_is_out_leaves_the_arrays_it_names(store, error):
    write = type(store.objects).write

    def fails_behind_the_record(self: Any, name: str, data: bytes) -> None:
        write(self, name, data)
        if name.startswith("commits/"):
            raise error

    with mock.patch.object(type(store.objects), "write", fails_behind_the_record), pytest.raises(error):
        write_column(store, Manifest(store), "s0", COLUMN, ARRAYS, **SIZES)
    record = Manifest(store).record("s0", "hidden/1")
    assert (read_column(store, record)["values"] == ARRAYS["values"]).all()


@pytest.mark.parametrize("step", ["write_tables", "remove"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_fold_that_fails_leaves_the_column_that_was_committed_before_it(store, monkeypatch, error, step):
    monkeypatch.setattr("coldstill.cache.manifest.FOLD_EVERY", 1)

    def fails(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        if step == "write_tables":
            patch.setattr("coldstill.cache.tables.write_tables", fails)
        else:
            patch.setattr(type(store.objects), "remove", fails)
        with pytest.raises(error):
            write_column(store, Manifest(store), "s0", COLUMN, ARRAYS, **SIZES)
    record = Manifest(store).record("s0", "hidden/1")
    assert (read_column(store, record)["values"] == ARRAYS["values"]).all()


def test_a_flipped_byte_of_the_row_table_is_corrupt(store, make_rows, lay):
    lay(store, make_rows([5, 3, 9]))
    good = read_rows(store)
    (file,) = Path(store.path, "rows").iterdir()
    for _ in flipped(file):
        with pytest.raises(CorruptError, match=f"rows/{file.name}"):
            read_rows(store)
    assert read_rows(store).equals(good)


@pytest.mark.parametrize("labels", [(), [(0.5, 2.0), (0.0, 1.0), (3.0, 1.0)]], ids=["prompts", "spans and labels"])
def test_a_flipped_byte_of_a_selection_is_a_store_error_or_harmless(store, make_rows, lay, labels):
    rows = make_rows([5, 3, 9])
    lay(store, rows)
    good = write_selection(store, found_rows(store, rows), [(), (), (Span(0, 1, 0.0),)], {"tokenizer": "abc"}, labels)
    num_refused = 0
    for _ in flipped(Path(store.path, "selections", f"{good.name}.parquet"), step=3):
        try:
            read = read_selection(store, good.name)
            assert read.provenance == good.provenance
            assert list(read.shard_names) == list(good.shard_names)
            for field in ("shard_numbers", "positions", "starts", "lengths", "labels"):
                assert getattr(read, field).tolist() == getattr(good, field).tolist()
            assert list(read.spans) == list(good.spans)
        except StoreError:
            num_refused += 1
    assert num_refused > 100


def test_a_flipped_byte_of_the_root_metadata_is_a_store_error_or_harmless(store, teacher):
    num_refused = 0
    for _ in flipped(Path(store.path, "arrays.zarr/zarr.json")):
        try:
            assert open_store(store.path).teacher == teacher
        except StoreError:
            num_refused += 1
    assert num_refused > 100


def test_a_token_beyond_32_bits_is_refused():
    for tokens in (np.array([2**32]), np.array([-1]), np.array([1.5])):
        with pytest.raises(ValueError, match="token ids are whole numbers from 0"):
            row_id(tokens)


def test_a_column_is_never_written_over_another_or_into_its_folder(store):
    manifest = Manifest(store)
    write_column(store, manifest, "s0", Column("hidden/1/int8", COLUMN.arrays), ARRAYS, **SIZES)
    for name in ("hidden/1", "hidden/1/int8", "hidden/1/int8/values"):
        with pytest.raises(ValueError, match=f"column {name} cannot be written: shard s0 has hidden/1/int8 already"):
            write_column(store, manifest, "s0", Column(name, COLUMN.arrays), ARRAYS, **SIZES)
    write_column(store, manifest, "s0", Column("hidden/10", COLUMN.arrays), ARRAYS, **SIZES)
