"""Threads make batches ahead of their turn: all of them, in order, not too far ahead, and with their own errors."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch

from coldstill.cache.tokens import TOKENS
from coldstill.pipeline.runtime.errors import DataError
from coldstill.pipeline.stage_two.batches import RowSet, StoredRow
from coldstill.pipeline.stage_two.feed import Chosen, Feed

CPU = torch.device("cpu")
NUM_THREADS = 3


class Rows(RowSet):
    """Rows of one token each, the row's number; the first of each batch takes its time, and one row is damaged."""

    def __init__(self, damaged: int = -1) -> None:
        self.damaged = damaged
        self.readers: set[str] = set()

    def __len__(self) -> int:
        return 20

    def __getitems__(self, indices: Sequence[int]) -> list[StoredRow]:
        self.readers.add(threading.current_thread().name)
        time.sleep(0.02 if indices[0] % 4 == 0 else 0.0)
        if self.damaged in indices:
            raise DataError(f"row {self.damaged} is damaged")
        return [StoredRow({TOKENS: {"ids": np.array([index])}}) for index in indices]


def collate(rows: Sequence[StoredRow]) -> dict[str, Any]:
    return {"input_ids": torch.tensor([row.arrays[TOKENS]["ids"].tolist() for row in rows])}


@pytest.fixture
def feed() -> Iterator[Feed]:
    made = Feed(NUM_THREADS, CPU)
    yield made
    made.close()


def begun(feed: Feed, rows: Rows, count: list[int]) -> "Iterator[Future[dict[str, Any]]]":
    for start in range(0, len(rows), 2):
        count.append(start)
        yield feed.read(Chosen(rows, [start, start + 1]), collate)


def test_batches_come_in_their_order_whichever_is_made_first_and_by_several_threads(feed: Feed):
    rows = Rows()
    batches = list(feed.ahead(begun(feed, rows, [])))
    assert [batch["input_ids"].flatten().tolist() for batch in batches] == [[n, n + 1] for n in range(0, 20, 2)]
    assert len(rows.readers) > 1


def test_no_more_is_begun_than_there_are_threads_beside_what_is_on_its_way(feed: Feed):
    count: list[int] = []
    coming = feed.ahead(begun(feed, Rows(), count))
    for taken in range(1, 5):
        next(coming)
        assert len(count) == taken + NUM_THREADS + 1


def test_an_error_comes_as_itself_in_its_turn(feed: Feed):
    coming = feed.ahead(begun(feed, Rows(damaged=5), []))
    assert [next(coming)["input_ids"][0].item() for _ in range(2)] == [0, 2]
    with pytest.raises(DataError, match="^row 5 is damaged$"):
        next(coming)


def test_a_feed_that_is_closed_leaves_no_thread_and_begins_nothing_that_waited():
    rows, before = Rows(), threading.active_count()
    feed = Feed(1, CPU)
    waiting = [feed.read(Chosen(rows, [4 * index]), collate) for index in range(5)]
    feed.close()
    assert threading.active_count() == before
    assert any(future.cancelled() for future in waiting)
