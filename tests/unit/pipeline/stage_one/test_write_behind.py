"""Columns are written by another thread in order, waited for at the end; a failure is raised and loses nothing."""

import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from coldstill.cache.columns import ArraySpec, Column
from coldstill.cache.local_objects import LocalObjects
from coldstill.cache.manifest import Manifest
from coldstill.cache.store import Store, create_store
from coldstill.pipeline.stage_one.write_behind import WriteBehind

COUNTS = {"num_tokens": 3, "num_rows": 1}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return create_store(str(tmp_path), {"identity": {"weights": "w"}, "name": "t"})


def column(name: str, *, width: int = 1) -> tuple[Column, dict[str, np.ndarray]]:
    values = np.arange(3 * width, dtype=np.float32).reshape(3, width)
    return Column(name, {"values": ArraySpec("float32", (width,))}, {}), {"values": values}


class HeldDisk(LocalObjects):
    """A disk that writes nothing before it may, and that refuses a column."""

    def __init__(self, root: str, *, refuses: str = "none") -> None:
        super().__init__(root)
        self.may_write = threading.Event()
        self._refused = f"/{refuses}/"

    def write_all(self, objects: Mapping[str, bytes]) -> None:
        assert self.may_write.wait(timeout=30)
        if any(self._refused in name for name in objects):
            raise OSError("disk is full")
        super().write_all(objects)


def refusing(store: Store, column: str) -> Store:
    """Give the store on a disk that refuses a column."""
    disk = HeldDisk(store.path, refuses=column)
    disk.may_write.set()
    return Store(disk, store.teacher)


def test_leaving_the_context_waits_for_all_columns_in_their_order(store: Store):
    manifest, written = Manifest(store), list[int]()
    widths = {"c": 4, "a": 400, "b": 40}
    with WriteBehind(store, manifest, written.append) as writer:
        for name, width in widths.items():
            writer.write("s", *column(name, width=width), **COUNTS)
    assert written == [manifest.record("s", name).stored_bytes for name in widths]
    assert len(set(written)) == 3
    assert Manifest(store).columns() == ["a", "b", "c"]


def test_the_caller_does_not_wait_for_the_disk(store: Store):
    disk = HeldDisk(store.path)
    held = Store(disk, store.teacher)
    manifest = Manifest(held)
    with WriteBehind(held, manifest, lambda _: None) as writer:
        writer.write("s", *column("a"), **COUNTS)
        writer.write("s", *column("b"), **COUNTS)
        assert manifest.columns() == []
        disk.may_write.set()
        writer.flush()
        assert manifest.columns() == ["a", "b"]


def test_a_write_that_fails_is_raised_at_the_end_and_what_was_committed_stays(store: Store):
    full = refusing(store, "b")
    manifest = Manifest(full)

    def write_all() -> None:
        with WriteBehind(full, manifest, lambda _: None) as writer:
            for name in ("a", "b"):
                writer.write("s", *column(name), **COUNTS)

    with pytest.raises(OSError, match="disk is full"):
        write_all()
    assert Manifest(store).columns() == ["a"]


def test_a_write_that_fails_is_raised_by_the_next_one_and_the_rest_is_dropped(store: Store):
    full = refusing(store, "a")

    def write_all() -> None:
        with WriteBehind(full, Manifest(full), lambda _: None) as writer:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:  # the first one fails in its own time
                writer.write("s", *column("a"), **COUNTS)
                time.sleep(0.002)
            raise AssertionError("the failure was not raised")

    with pytest.raises(OSError, match="disk is full"):
        write_all()
    assert Manifest(store).columns() == []


def test_an_interrupt_ends_the_column_at_hand_and_drops_the_others(store: Store):
    disk = HeldDisk(store.path)
    held = Store(disk, store.teacher)

    def interrupted() -> None:
        with WriteBehind(held, Manifest(held), lambda _: None) as writer:
            for name in ("a", "b", "c"):
                writer.write("s", *column(name), **COUNTS)
            threading.Timer(0.2, disk.may_write.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert Manifest(store).columns() == ["a"]
