"""Flipped bytes in every kind of file, and publishing that fails when the record is already out."""

import contextlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from cache.columns import ArraySpec, Column
from cache.errors import FormatError, ModelError, StoreError
from cache.identity import row_id, weights_digest
from cache.manifest import Manifest
from cache.reader import read_column
from cache.rows import find_rows, lay_rows, read_selection, write_selection
from cache.store import open_store
from cache.writer import write_column

COLUMN = Column("hidden/1", {"values": ArraySpec("float32", (2,))})
ARRAYS = {"values": np.ones((4, 2), "f4")}
SIZES = {"num_tokens": 4, "num_rows": 1}


def flipped(file: Path) -> Iterator[int]:
    """Damage one byte after another, each in two ways, and leave the file as it was."""
    good = file.read_bytes()
    for index in range(len(good)):
        for bit in (1, 0x80):
            file.write_bytes(good[:index] + bytes([good[index] ^ bit]) + good[index + 1 :])
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


def test_a_flipped_byte_of_the_row_table_is_never_another_place(store, make_rows, lay):
    rows = make_rows([5, 3, 9])
    lay(store, rows)
    ids = [row_id(row) for row in rows]
    good = find_rows(store, ids).to_pylist()
    (file,) = Path(store.path, "rows").iterdir()
    for _ in flipped(file):
        with contextlib.suppress(StoreError):
            assert find_rows(store, ids).to_pylist() == good


def test_a_flipped_byte_of_a_selection_is_a_store_error_or_harmless(store, make_rows, lay):
    rows = make_rows([5, 3, 9])
    lay(store, rows)
    good = write_selection(store, find_rows(store, [row_id(row) for row in rows]), [0, 0, 1], {"tokenizer": "abc"})
    for _ in flipped(Path(store.path, "selections", f"{good.name}.parquet")):
        try:
            read = read_selection(store, good.name)
            assert read.provenance == good.provenance
            assert read.starts.tolist() == good.starts.tolist()
        except StoreError:
            pass


def test_the_same_rows_from_elsewhere_are_another_selection(store, make_rows, lay):
    rows = make_rows([5])
    lay(store, rows)
    found = find_rows(store, [row_id(rows[0])])
    first = write_selection(store, found, [1], {"tokenizer": "one"})
    second = write_selection(store, found, [1], {"tokenizer": "two"})
    assert first.name != second.name
    assert (first.provenance, second.provenance) == ({"tokenizer": "one"}, {"tokenizer": "two"})


@pytest.mark.parametrize(
    "text",
    ["[]", "5", '"x"', '{"attributes": []}', '{"attributes": null}', '{"attributes": {"coldstill": {"format": 1}}}'],
)
def test_other_metadata_is_no_store(store, text):
    Path(store.path, "arrays.zarr/zarr.json").write_text(text)
    with pytest.raises(FormatError, match=r"zarr.json is not the metadata of a Coldstill store"):
        open_store(store.path)


@pytest.mark.parametrize(
    "header",
    [[], 5, {"a": {}}, {"a": [1]}, *({"a": {"dtype": "F32", "shape": [], "data_offsets": offsets}}
     for offsets in ([5, 0], [-5000, 0], ["x", 1], [1]))],
)  # fmt: skip
def test_a_header_of_another_shape_is_no_safetensors_file(tmp_path, header):
    encoded = json.dumps(header).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + b"123456")
    with pytest.raises(ModelError, match=r"m.safetensors is not a safetensors file: "):
        weights_digest(tmp_path)


def test_a_row_without_tokens_and_a_token_beyond_32_bits_are_refused(store):
    with pytest.raises(ValueError, match="a row needs at least one token"):
        lay_rows(store, [b"0" * 16], [0])
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
