"""A writer that is killed at any step leaves a store that opens, reads right, and resumes to the same bytes."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cache.columns import ArraySpec, Column
from cache.errors import StoreNotFoundError
from cache.identity import fingerprint, row_id, shard_id
from cache.manifest import Manifest
from cache.objects import PARTIAL_SUFFIX
from cache.reader import Reader, read_column
from cache.rows import find_rows, lay_rows, publish_rows, write_selection
from cache.store import Store, create_store, open_store, store_path
from cache.writer import write_column

TEACHER = {"identity": {"config": "c0", "weights": "w0", "dtype": "float32"}}
ROWS = [np.arange(length, dtype=np.int64) + 100 * length for length in (4, 5, 7, 2)]
ROW_IDS = [row_id(row) for row in ROWS]
SHARDS = {shard_id(ROW_IDS[:2]): ROWS[:2], shard_id(ROW_IDS[2:]): ROWS[2:]}
TOKENS = Column("tokens", {"ids": ArraySpec("uint16")})
HIDDEN = Column("hidden/3", {"values": ArraySpec("float32", (2,)), "length": ArraySpec("int32", (), "row")})
PROVENANCE = {"source": "test"}
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
    monkeypatch.setattr("cache.rows.SHARD_TOKENS", 10)
    monkeypatch.setattr("cache.columns._CHUNK_TARGET_BYTES", 16)


def values_of(column: Column, rows: list[np.ndarray]) -> dict[str, np.ndarray]:
    ids = np.concatenate(rows)
    if column is TOKENS:
        return {"ids": ids.astype("uint16")}
    values = np.stack([np.sin(ids), np.cos(ids)], axis=1).astype("float32")
    return {"values": values, "length": np.array([len(row) for row in rows], "int32")}


def write_store(root: Path) -> None:
    """Bring a store of two shards by two columns to its end, from wherever an earlier call was cut off."""
    store = create_store(str(root), TEACHER)
    laid = lay_rows(store, ROW_IDS, [len(row) for row in ROWS])
    manifest = Manifest(store)
    if len(laid):
        write_missing(store, manifest, TOKENS, dict.fromkeys(laid["shard"].to_pylist()))
        publish_rows(store, laid)
    selection = write_selection(store, find_rows(store, ROW_IDS), [0] * len(ROWS), PROVENANCE)
    write_missing(store, manifest, HIDDEN, selection.shard_names())
    manifest.compact()


def write_missing(store: Store, manifest: Manifest, column: Column, shards: Iterable[str]) -> None:
    for shard in shards:
        rows = SHARDS[shard]
        if (shard, column.name) not in manifest:
            size = {"num_tokens": sum(map(len, rows)), "num_rows": len(rows)}
            write_column(store, manifest, shard, column, values_of(column, rows), **size)


def assert_what_is_listed_reads_back(root: Path) -> None:
    try:
        store = open_store(store_path(str(root), fingerprint(TEACHER["identity"])))
    except StoreNotFoundError:
        return  # killed before the store was created
    manifest = Manifest(store)
    for shard, rows in SHARDS.items():
        for column in (TOKENS, HIDDEN):
            if (shard, column.name) in manifest:
                read = read_column(store, manifest.record(shard, column.name))
                for name, values in values_of(column, rows).items():
                    np.testing.assert_array_equal(read[name], values)
    try:
        find_rows(store, ROW_IDS)
    except StoreNotFoundError:
        return  # the rows are not published
    assert all((shard, "tokens") in manifest for shard in SHARDS), "rows are known whose tokens cannot be read"


def files(root: Path) -> dict[str, bytes]:
    """Give every file that is not a killed write's leftover: relative path -> bytes."""
    paths = [path for path in root.rglob("*") if path.is_file() and path.suffix != PARTIAL_SUFFIX]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


@dataclass(frozen=True)
class Kill:
    """Where a writer dies: before or after the nth call of a method of `Path`."""

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
    assert all((shard, column.name) in Manifest(store) for shard in SHARDS for column in (TOKENS, HIDDEN))
    selection = write_selection(store, find_rows(store, ROW_IDS), [0] * len(ROWS), PROVENANCE)
    reader = Reader(store, selection, ["tokens", "hidden/3"])
    for index, row in enumerate(ROWS):
        np.testing.assert_array_equal(reader.row(index)["tokens"]["ids"], row)
        assert reader.row(index)["hidden/3"]["length"] == len(row)


def check_and_resume(root: Path) -> None:
    assert_what_is_listed_reads_back(root)
    write_store(root)
    check_complete(root)


def test_an_undisturbed_store_reads_back(tmp_path: Path, undisturbed: dict[str, bytes]):
    assert in_child(lambda: check_complete(tmp_path / "undisturbed")) == 0
    assert files(tmp_path / "undisturbed") == undisturbed


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("method", ["replace", "unlink"])
def test_a_writer_killed_at_any_step_resumes_to_the_same_bytes(
    tmp_path: Path, undisturbed: dict[str, bytes], method: str, after: bool
):
    number = 1
    while write_until(root := tmp_path / str(number), Kill(method, number, after)):
        assert in_child(lambda root=root: check_and_resume(root)) == 0, f"after a kill at {method} {number}"
        assert files(root) == undisturbed, f"other bytes after a kill at {method} {number}"
        number += 1
    assert number > len(undisturbed), "the writer was not killed at every publish"
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
