import errno
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from coldstill.cache.arrays import read_column
from coldstill.cache.columns import Column
from coldstill.cache.local_objects import PARTIAL_FOLDER, LocalObjects
from coldstill.cache.manifest import CommitRecord, Manifest
from coldstill.cache.processes import process_token
from coldstill.cache.store import CONSTANTS, Store, create_store
from coldstill.cache.writer import column_folder, column_metadata, object_path, write_column

SIZE = {"num_tokens": 20, "num_rows": 3}
FOLDER = "arrays.zarr/shards/s0/hidden/12/mixed"


@dataclass(frozen=True)
class Unfit:
    id: str
    change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
    message: str


UNFIT = [
    Unfit(
        "wrong length",
        lambda values: values | {"values": values["values"][:-1]},
        r"array values of column hidden/12/mixed must be float16 of shape \(20, 3\), got float16 of \(19, 3\)",
    ),
    Unfit(
        "wrong rank",
        lambda values: values | {"ids": values["ids"][:, None]},
        r"array ids of column hidden/12/mixed must be uint32 of shape \(20,\), got uint32 of \(20, 1\)",
    ),
    Unfit(
        "tokens for rows",
        lambda values: values | {"lengths": np.zeros((20, 2), "int32")},
        r"array lengths of column hidden/12/mixed must be int32 of shape \(3, 2\), got int32 of \(20, 2\)",
    ),
    Unfit(
        "wrong dtype",
        lambda values: values | {"values": values["values"].astype("float32")},
        r"must be float16 of shape \(20, 3\), got float32 of \(20, 3\)",
    ),
    Unfit(
        "missing array",
        lambda values: {name: array for name, array in values.items() if name != "scale"},
        r"has arrays \['ids', 'lengths', 'scale', 'values'\], got \['ids', 'lengths', 'values'\]",
    ),
    Unfit(
        "unknown array",
        lambda values: values | {"offset": values["scale"]},
        r"column hidden/12/mixed has arrays .*, got \['ids', 'lengths', 'offset', 'scale', 'values'\]",
    ),
]


class FailingObjects(LocalObjects):
    """Objects on a disk that is full when the nth object is to be written."""

    def __init__(self, root: str, *, fail_at: int) -> None:
        super().__init__(root)
        self.num_writes = 0
        self._fail_at = fail_at

    def write_all(self, objects: Mapping[str, bytes]) -> None:
        for name, data in objects.items():
            self.num_writes += 1
            if self.num_writes == self._fail_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().write_all({name: data})


@pytest.fixture
def values(every_axis: Column, fill) -> dict[str, np.ndarray]:
    return fill(every_axis, **SIZE)


def assert_nothing_written(store: Store, files: dict[str, bytes]) -> None:
    assert not Path(store.path, FOLDER).exists()
    assert not [name for name in files if name.startswith(("commits/", PARTIAL_FOLDER))]
    assert Manifest(store).columns() == []


def assert_reads_back(store: Store, values: dict[str, np.ndarray]) -> None:
    read = read_column(store, Manifest(store).record("s0", "hidden/12/mixed"))
    assert read.keys() == values.keys()
    for name in values:
        np.testing.assert_array_equal(read[name], values[name])


def test_a_written_column_is_committed_and_reads_back(store: Store, every_axis: Column, values):
    manifest = Manifest(store)
    record = write_column(store, manifest, "s0", every_axis, values, **SIZE)
    assert manifest.record("s0", every_axis.name) == Manifest(store).record("s0", every_axis.name) == record
    assert (record.column, record.num_tokens, record.num_rows) == (every_axis, 20, 3)
    assert_reads_back(store, values)


def test_a_records_bytes_are_those_on_disk(store: Store, every_axis: Column, values, tree):
    record = write_column(store, Manifest(store), "s0", every_axis, values, **SIZE)
    objects = {name: data for name, data in tree(Path(store.path, FOLDER)).items() if not name.endswith("zarr.json")}
    assert record.stored_bytes == sum(len(data) for data in objects.values())
    assert record.objects == {
        name.split("/")[0]: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in objects.items()
    }
    assert sorted(objects) == ["ids/c.0", "lengths/c.0.0", "scale/c.0", "values/c.0.0"]


def test_the_same_values_are_the_same_bytes(store: Store, every_axis: Column, values, tree, teacher, tmp_path: Path):
    write_column(store, Manifest(store), "s0", every_axis, values, **SIZE)
    other = create_store(str(tmp_path / "other"), teacher)
    copies = {name: array.copy() for name, array in reversed(values.items())}
    write_column(other, Manifest(other), "s0", every_axis, copies, **SIZE)
    assert tree(other.path) == tree(store.path)


def test_constants_are_written_beside_the_shards(store: Store, every_axis: Column, values):
    record = write_column(store, Manifest(store), CONSTANTS, every_axis, values, **SIZE)
    assert Path(store.path, "arrays.zarr/constants/hidden/12/mixed/values/zarr.json").is_file()
    np.testing.assert_array_equal(read_column(store, record)["values"], values["values"])


@pytest.mark.parametrize("unfit", UNFIT, ids=lambda unfit: unfit.id)
def test_arrays_that_do_not_fit_the_column_are_refused(store: Store, every_axis: Column, values, tree, unfit: Unfit):
    before = tree(store.path)
    with pytest.raises(ValueError, match=unfit.message):
        write_column(store, Manifest(store), "s0", every_axis, unfit.change(values), **SIZE)
    assert tree(store.path) == before


def test_what_an_uncommitted_attempt_left_is_replaced(store: Store, every_axis: Column, values, tree):
    manifest = Manifest(store)
    record = write_column(store, manifest, "s0", every_axis, values, **SIZE)
    expected = tree(store.path)
    store.objects.remove("commits/s0~hidden~12~mixed.json")
    store.objects.write(object_path(record, "values"), b"half of the bytes")
    store.objects.write(f"{FOLDER}/values/zarr.json", b"{")
    store.objects.remove(f"{FOLDER}/ids/zarr.json")
    Path(store.path, PARTIAL_FOLDER, f"{process_token()}.0123").write_bytes(b"{")
    write_column(store, Manifest(store), "s0", every_axis, values, **SIZE)
    store.objects.remove(f"{PARTIAL_FOLDER}/{process_token()}.0123")
    assert tree(store.path) == expected


def test_a_columns_own_metadata_carries_its_record(store: Store, every_axis: Column, values):
    record = write_column(store, Manifest(store), "s0", every_axis, values, **SIZE)
    metadata = column_metadata(record)
    assert {name: store.objects.read(name) for name in metadata} == metadata
    assert len(metadata) == 1 + len(every_axis.arrays)
    attributes = json.loads(metadata[f"{column_folder(record)}/zarr.json"])["attributes"]
    assert attributes["block"] == 12
    assert CommitRecord.from_line(attributes["coldstill"]) == record


def test_a_column_leaves_its_neighbours_alone(store: Store, every_axis: Column, values):
    manifest = Manifest(store)
    write_column(store, manifest, "s0", every_axis, values, **SIZE)
    neighbours = [Column("hidden/12/mixed_2", every_axis.arrays), Column("hidden/1/mixed", every_axis.arrays)]
    for column in neighbours:
        write_column(store, manifest, "s0", column, values, **SIZE)
    write_column(store, manifest, "s1", every_axis, values, **SIZE)
    assert_reads_back(store, values)


def test_a_write_that_fails_anywhere_leaves_nothing_and_can_be_done_again(
    store: Store, every_axis: Column, values, tree, teacher, tmp_path: Path
):
    counting = Store(FailingObjects(store.path, fail_at=0), teacher)
    write_column(counting, Manifest(counting), "s0", every_axis, values, **SIZE)
    expected = tree(store.path)
    num_writes = counting.objects.num_writes
    assert num_writes == 4 + 2 * len(values) + 1  # groups, arrays with their metadata, record
    for number in range(1, num_writes + 1):
        other = create_store(str(tmp_path / str(number)), teacher)
        failing = Store(FailingObjects(other.path, fail_at=number), teacher)
        manifest = Manifest(failing)
        with pytest.raises(OSError, match="No space left on device"):
            write_column(failing, manifest, "s0", every_axis, values, **SIZE)
        assert ("s0", every_axis.name) not in manifest
        assert_nothing_written(other, tree(other.path))
        write_column(other, Manifest(other), "s0", every_axis, values, **SIZE)
        assert tree(other.path) == expected


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt("stop")])
def test_a_publish_that_fails_anywhere_leaves_nothing(
    store: Store, every_axis: Column, values, tree, teacher, tmp_path: Path, monkeypatch, error: BaseException
):
    replace = Path.replace
    calls: list[Path] = []
    fail_at = 0

    def counted_replace(path: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == fail_at:
            raise error
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", counted_replace)
    write_column(store, Manifest(store), "s0", every_axis, values, **SIZE)
    num_publishes = len(calls)
    for number in range(1, num_publishes + 1):
        other = create_store(str(tmp_path / str(number)), teacher)
        calls.clear()
        fail_at = number
        with pytest.raises(type(error), match=str(error.args[-1])):
            write_column(other, Manifest(other), "s0", every_axis, values, **SIZE)
        fail_at = 0
        assert_nothing_written(other, tree(other.path))
        write_column(other, Manifest(other), "s0", every_axis, values, **SIZE)
        assert tree(other.path) == tree(store.path)
