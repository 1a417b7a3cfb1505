"""A writer that is killed at any step leaves a store that opens, reads right, and resumes to the same bytes."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from store_rows import found_rows, register

from coldstill.cache.arrays import read_column
from coldstill.cache.columns import ArraySpec, Column
from coldstill.cache.errors import StoreNotFoundError
from coldstill.cache.identity import fingerprint, row_id, shard_id
from coldstill.cache.local_objects import PARTIAL_FOLDER
from coldstill.cache.manifest import Manifest
from coldstill.cache.reader import Reader
from coldstill.cache.rows import compact_rows, read_rows
from coldstill.cache.selections import Selection, write_selection
from coldstill.cache.store import Store, create_store, open_store, store_path
from coldstill.cache.tokens import TOKENS, rows_of_tokens, token_column
from coldstill.cache.writer import write_column

TEACHER = {"identity": {"config": "c0", "weights": "w0", "dtype": "float32"}}
ROWS = [np.arange(length, dtype=np.int64) + 100 * length for length in (4, 5, 7, 2)]
ROW_IDS = [row_id(row) for row in ROWS]
SHARDS = {shard_id(ROW_IDS[:2]): ROWS[:2], shard_id(ROW_IDS[2:]): ROWS[2:]}
VOCAB_SIZE = 1000
HIDDEN = Column("hidden/3", {"values": ArraySpec("float32", (2,)), "length": ArraySpec("int32", (), "row")})
PROVENANCE = {"source": "test"}
NUM_FOLDED = 5  # a fold of three records, then one of it and the last
CHILD_TIMEOUT_S = 30

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def _imported_before_forks() -> None:
    """Make Arrow import what it otherwise imports when first used, again in each child."""
    import pyarrow.dataset

    pyarrow.table({"column": [1]})


@pytest.fixture(autouse=True)
def _small_and_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make shards and chunks small; leave out syncs, as a kill loses nothing that the kernel was given."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr("coldstill.cache.laying.SHARD_TOKENS", 10)
    monkeypatch.setattr("coldstill.cache.columns.CHUNK_TARGET_BYTES", 16)
    monkeypatch.setattr("coldstill.cache.manifest.FOLD_EVERY", 3)


def values_of(column: Column, rows: list[np.ndarray]) -> dict[str, np.ndarray]:
    ids = np.concatenate(rows)
    lengths = np.array([len(row) for row in rows], "int32")
    if column.name == TOKENS:
        return {"ids": ids.astype("uint16"), "lengths": lengths}
    return {"values": np.stack([np.sin(ids), np.cos(ids)], axis=1).astype("float32"), "length": lengths}


def select(store: Store, manifest: Manifest) -> Selection:
    found = found_rows(store, ROWS, manifest)
    return write_selection(store, found, [()] * len(ROWS), PROVENANCE)


def write_store(root: Path) -> None:
    """Bring a store of two shards by two columns to its end, from wherever an earlier call was cut off."""
    store = create_store(str(root), TEACHER)
    store.objects.sweep(is_alone=True)
    manifest = Manifest(store)
    register(store, ROWS, manifest, vocab_size=VOCAB_SIZE)
    for shard in select(store, manifest).shard_names:
        rows = SHARDS[shard]
        if (shard, HIDDEN.name) not in manifest:
            size = {"num_tokens": sum(map(len, rows)), "num_rows": len(rows)}
            write_column(store, manifest, shard, HIDDEN, values_of(HIDDEN, rows), **size)
    manifest.compact()
    compact_rows(store)


def assert_what_is_listed_reads_back(root: Path) -> None:
    try:
        store = open_store(store_path(str(root), fingerprint(TEACHER["identity"])))
    except StoreNotFoundError:
        return  # killed before the store was created
    manifest = Manifest(store)
    for record in manifest.records():
        read = read_column(store, record)
        expected = values_of(record.column, SHARDS[record.shard])
        assert read.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(read[name], values)
    assert {record.shard for record in manifest.records()} <= set(manifest.shards(TOKENS))
    known = read_rows(store)
    # Rows are published after all of their tokens, and say what the tokens say.
    assert set(known["shard"].to_pylist()) <= set(manifest.shards(TOKENS)), "rows are known that cannot be read"
    assert sorted(known["row"].to_pylist()) in ([], sorted(ROW_IDS))
    for shard in set(known["shard"].to_pylist()):
        record = manifest.record(shard, TOKENS)
        rebuilt = rows_of_tokens(record, read_column(store, record)).table().to_pylist()
        assert [line for line in known.to_pylist() if line["shard"] == shard] == rebuilt


def files(root: Path) -> dict[str, bytes]:
    """Give every file, what killed writes left as well: relative path -> bytes."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@dataclass(frozen=True)
class Kill:
    """Where a writer dies: before or after the nth time that a method of `Path` does something."""

    method: str
    number: int
    after: bool


def in_child(work: Callable[[], None]) -> int:
    """Do work in a forked process and give its exit code, negative where a signal ended it.

    The test's own process touches no store: forked while Arrow's threads are at work in it, a child can hang.
    """
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(CHILD_TIMEOUT_S)
    if child.is_alive():
        child.kill()
        child.join()
        pytest.fail("the child hung")
    return child.exitcode


def write_until(root: Path, kill: Kill) -> bool:
    """Write the store in a child that is killed as told; whether it was, rather than having come to its end."""
    original = getattr(Path, kill.method)
    num_calls = 0

    def killing(path: Path, *arguments, **options):
        nonlocal num_calls
        if not path.exists():
            return original(path, *arguments, **options)
        num_calls += 1
        if num_calls == kill.number and not kill.after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(path, *arguments, **options)
        if num_calls == kill.number and kill.after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def work() -> None:
        setattr(Path, kill.method, killing)
        write_store(root)

    exit_code = in_child(work)
    assert exit_code in (0, -signal.SIGKILL), f"the writer failed: {kill}"
    return exit_code != 0


@pytest.fixture
def undisturbed(tmp_path: Path) -> dict[str, bytes]:
    assert in_child(lambda: write_store(tmp_path / "undisturbed")) == 0
    return files(tmp_path / "undisturbed")


def check_complete(root: Path) -> None:
    assert_what_is_listed_reads_back(root)
    store = create_store(str(root), TEACHER)
    manifest = Manifest(store)
    assert manifest.columns() == sorted([TOKENS, HIDDEN.name])
    assert all((shard, column) in manifest for shard in SHARDS for column in manifest.columns())
    assert manifest.record(next(iter(SHARDS)), TOKENS).column == token_column(vocab_size=VOCAB_SIZE)
    reader = Reader(store, select(store, manifest), [TOKENS, HIDDEN.name])
    for row, read in zip(ROWS, reader.rows(range(len(ROWS))), strict=True):
        np.testing.assert_array_equal(read[TOKENS]["ids"], row)
        assert read[HIDDEN.name]["length"] == len(row)


def check_and_resume(root: Path) -> None:
    assert_what_is_listed_reads_back(root)
    write_store(root)
    check_complete(root)


def test_an_undisturbed_store_reads_back(tmp_path: Path, undisturbed: dict[str, bytes]):
    assert in_child(lambda: check_complete(tmp_path / "undisturbed")) == 0
    assert files(tmp_path / "undisturbed") == undisturbed
    assert not [name for name in undisturbed if PARTIAL_FOLDER in name]
    folders = [name.split("/")[2] for name in undisturbed if not name.startswith("stores/.")]
    assert (folders.count("commits"), folders.count("rows"), folders.count("selections")) == (1, 1, 1)


@pytest.mark.parametrize(
    ("method", "after"),
    [
        pytest.param("replace", False, id="before a publish"),
        pytest.param("replace", True, id="after a publish", marks=pytest.mark.slow),  # mostly before the next one
        pytest.param("unlink", False, id="before a removal"),
        pytest.param("unlink", True, id="after a removal"),
    ],
)
def test_a_writer_killed_at_any_step_resumes_to_the_same_bytes(
    tmp_path: Path, undisturbed: dict[str, bytes], method: str, after: bool
):
    number = 1
    while write_until(root := tmp_path / str(number), Kill(method, number, after)):
        assert in_child(lambda root=root: check_and_resume(root)) == 0, f"after a kill at {method} {number}"
        assert files(root) == undisturbed, f"other bytes after a kill at {method} {number}"
        number += 1
    least = len(undisturbed) if method == "replace" else NUM_FOLDED
    assert number > least, "the writer was not killed at every publish and every removal"
    assert files(root) == undisturbed


def test_a_writer_killed_again_and_again_comes_to_the_same_bytes(tmp_path: Path, undisturbed: dict[str, bytes]):
    root = tmp_path / "again"
    num_kills = 0
    while write_until(root, Kill("replace", 8, after=True)):
        assert in_child(lambda: assert_what_is_listed_reads_back(root)) == 0
        num_kills += 1
        assert num_kills <= len(undisturbed), "the writer makes no progress"
    assert num_kills > 1
    assert files(root) == undisturbed
