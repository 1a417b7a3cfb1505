"""Columns are written by another thread in order, waited for at the end; a failure is raised and loses nothing."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coldstill.cache.columns import ArraySpec, Column
from coldstill.cache.manifest import Manifest
from coldstill.cache.store import Store, create_store
from coldstill.pipeline.stage_one.write_behind import WriteBehind

COUNTS = {"num_tokens": 3, "num_rows": 1}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return create_store(str(tmp_path), {"identity": {"weights": "w"}, "name": "t"})


def column(name: str) -> tuple[Column, dict[str, np.ndarray]]:
    return Column(name, {"values": ArraySpec("float32")}, {}), {"values": np.arange(3, dtype=np.float32)}


def test_leaving_the_context_waits_for_all_columns_in_their_order(store: Store):
    manifest, written = Manifest(store), []
    with WriteBehind(store, manifest, written.append) as writer:
        for name in ("c", "a", "b"):
            writer.write("s", *column(name), **COUNTS)
    assert len(written) == 3
    assert list(manifest._places) == ["c", "a", "b"]
    assert Manifest(store).columns() == ["a", "b", "c"]


def test_the_caller_does_not_wait_for_the_disk(store: Store, held_write: Callable[[], None]):
    manifest = Manifest(store)
    with WriteBehind(store, manifest, lambda _: None) as writer:
        writer.write("s", *column("a"), **COUNTS)
        writer.write("s", *column("b"), **COUNTS)
        assert manifest.columns() == []
        held_write()
        writer.flush()
        assert manifest.columns() == ["a", "b"]


def test_a_write_that_fails_is_raised_at_the_end_and_what_was_committed_stays(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    fail_at(monkeypatch, "b")
    manifest = Manifest(store)

    def write_all() -> None:
        with WriteBehind(store, manifest, lambda _: None) as writer:
            for name in ("a", "b"):
                writer.write("s", *column(name), **COUNTS)

    with pytest.raises(OSError, match="disk is full"):
        write_all()
    assert Manifest(store).columns() == ["a"]


def test_a_write_that_fails_is_raised_by_the_next_one_and_the_rest_is_dropped(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    fail_at(monkeypatch, "a")

    def write_all() -> None:
        with WriteBehind(store, Manifest(store), lambda _: None) as writer:
            writer.write("s", *column("a"), **COUNTS)
            writer._pending[0].exception()  # waits for it
            writer.write("s", *column("b"), **COUNTS)
            raise AssertionError("the failure was not raised")

    with pytest.raises(OSError, match="disk is full"):
        write_all()
    assert Manifest(store).columns() == []


def test_an_interrupt_ends_the_column_at_hand_and_drops_the_others(store: Store, held_write: Callable[[], None]):
    def interrupted() -> None:
        with WriteBehind(store, Manifest(store), lambda _: None) as writer:
            for name in ("a", "b", "c"):
                writer.write("s", *column(name), **COUNTS)
            threading.Timer(0.2, held_write).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert Manifest(store).columns() == ["a"]


@pytest.fixture
def held_write(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let no column be written before the function that this gives is called."""
    from coldstill.pipeline.stage_one import write_behind

    write, may_write = write_behind.write_column, threading.Event()

    def held(*args: Any, **kwargs: Any) -> Any:
        assert may_write.wait(timeout=30)
        return write(*args, **kwargs)

    monkeypatch.setattr(write_behind, "write_column", held)
    return may_write.set


def fail_at(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """Let the disk refuse a column."""
    from coldstill.pipeline.stage_one import write_behind

    write = write_behind.write_column

    def refused(store: Store, manifest: Manifest, shard: str, column: Column, *args: Any, **kwargs: Any) -> Any:
        if column.name == failing:
            raise OSError("disk is full")
        return write(store, manifest, shard, column, *args, **kwargs)

    monkeypatch.setattr(write_behind, "write_column", refused)
