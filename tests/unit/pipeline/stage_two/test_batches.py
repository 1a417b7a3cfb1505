"""Stored rows as batches: padded on the right, each array by its axis, and an order that a resumed run meets again."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coldstill.cache.reader import RowArrays
from coldstill.pipeline.outputs.run_index import find_run_rows
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.stage_two.batches import BatchCollator, BatchColumns, EpochOrder, StoredRow, StoredRows

FINAL, NORMALISER, HIDDEN = "logits/final/float32", "logsumexp/1", "hidden/3/int8"
COLUMNS = BatchColumns({"final": FINAL, "logsumexp": NORMALISER}, {3: HIDDEN})
AXES: dict[str, dict[str, Any]] = {
    "tokens": {"ids": "token", "lengths": "row"},
    FINAL: {"values": "token"},
    NORMALISER: {"values": "token"},
    HIDDEN: {"values": "token", "first": "row", "scale": "shard"},
}


def arrays_of(length: int) -> RowArrays:
    """Give a row whose values say their position, and its length where there is one for the row."""
    position = np.arange(1, length + 1)
    return {
        "tokens": {"ids": position.astype(np.uint16)},
        FINAL: {"values": np.repeat(position[:, None], 2, axis=1).astype(np.float32)},
        NORMALISER: {"values": position.astype(np.float32)},
        HIDDEN: {
            "values": np.repeat(position[:, None], 3, axis=1).astype(np.int8),
            "first": np.array([length, -length], np.int32),
            "scale": np.array([0.5, 2.0, 4.0], np.float32),
        },
    }


def collated(lengths: list[int], columns: BatchColumns = COLUMNS) -> dict[str, Any]:
    return BatchCollator(columns, AXES)([StoredRow(arrays_of(length)) for length in lengths])


def test_rows_of_several_lengths_are_padded_with_zeros_on_the_right_and_masked():
    batch = collated([3, 5])
    assert batch["input_ids"].dtype == torch.int64
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0, 0], [1, 2, 3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, -100], [-100, 2, 3, 4, 5]]
    normaliser = batch["logits"]["logsumexp"]["values"]
    assert normaliser.tolist() == [[1, 2, 3, 0, 0], [1, 2, 3, 4, 5]]


def test_rows_of_one_length_need_no_mask():
    assert "attention_mask" not in collated([4, 4])


def test_each_array_is_laid_by_its_axis_in_the_dtype_in_which_it_is_stored():
    hidden = collated([3, 5])["hidden"]["3"]
    assert list(hidden) == ["values", "first", "scale"]
    assert hidden["values"].dtype == torch.int8
    assert hidden["values"].shape == (2, 5, 3)
    assert hidden["values"][0, :, 0].tolist() == [1, 2, 3, 0, 0]
    assert hidden["first"].tolist() == [[3, -3], [5, -5]]
    assert hidden["scale"].tolist() == [[0.5, 2.0, 4.0]] * 2


def test_a_batch_carries_the_targets_that_are_asked_for_and_no_others():
    assert set(collated([4, 4])) == {"input_ids", "labels", "logits", "hidden"}
    assert set(collated([4, 4], BatchColumns({}, {}))) == {"input_ids", "labels"}
    assert COLUMNS.names() == ["tokens", FINAL, NORMALISER, HIDDEN]


@pytest.fixture
def stored(whole_run: Path) -> StoredRows:
    run = find_run_rows(load_recipe(whole_run.parent / "recipe.yaml"))
    return StoredRows(run.store.path, run.selections["train"], BatchColumns({}, {}))


def ids_of(rows: list[StoredRow]) -> list[list[int]]:
    return [row.arrays["tokens"]["ids"].tolist() for row in rows]


def test_rows_come_one_by_one_and_together_the_same(stored: StoredRows):
    assert len(stored) == 16
    together = stored.__getitems__([5, 0, 5])
    assert ids_of(together) == ids_of([stored[5], stored[0], stored[5]])
    assert ids_of([stored[0]]) != ids_of([stored[5]])


def test_rows_that_were_read_before_go_to_another_process_without_what_is_open(stored: StoredRows):
    expected = ids_of([stored[3]])
    sent = pickle.dumps(stored)
    assert b"Reader" not in sent
    assert ids_of([pickle.loads(sent)[3]]) == expected


def order_of(*, seed: int, epoch: int, num_rows: int = 50) -> list[int]:
    order = EpochOrder(num_rows, seed=seed)
    order.set_epoch(epoch)
    return list(order)


def test_an_order_is_every_row_once_by_seed_and_epoch_alone():
    first = order_of(seed=1, epoch=0)
    assert sorted(first) == list(range(50))
    assert order_of(seed=1, epoch=0) == first
    assert len({tuple(order_of(seed=seed, epoch=epoch)) for seed in (1, 2) for epoch in (0, 1, 2)}) == 6
    assert len(EpochOrder(50, seed=1)) == 50


def test_an_order_is_the_same_each_time_it_is_gone_through_until_the_epoch_is_another():
    order = EpochOrder(50, seed=1)
    assert list(order) == list(order)
    first = list(order)
    order.set_epoch(1)
    assert list(order) != first
    order.set_epoch(0)
    assert list(order) == first
