"""Weights in ordinary batches: one for each token, as labels are; what they may be, and what they do to a step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from live_pair import CPU, arguments, ids_of
from tiny import NARROW

from coldstill.pipeline.runtime.errors import DataError
from coldstill.pipeline.stage_two.completing import complete_batch
from coldstill.pipeline.stage_two.distillation_trainer import UniversalDistillationTrainer

IDS = torch.tensor([[5, 6, 7, 8], [5, 9, 9, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


def test_what_weighs_nothing_is_ignored_and_all_else_keeps_its_weight():
    weights = torch.tensor([[1.0, 0.0, 0.5, 2.0], [1.0, 1.0, 0.25, 1.0]])
    batch = complete_batch({"input_ids": IDS, "attention_mask": MASK, "weights": weights})
    assert batch["labels"].tolist() == [[-100, -100, 7, 8], [-100, 9, 9, -100]]
    assert torch.equal(batch["weights"], weights)
    assert "weights" not in complete_batch({"input_ids": IDS})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(2, 3), r"weights of shape \[2, 3\] for input_ids of shape \[2, 4\]; expected one weight for each"),
        (torch.full((2, 4), -0.5), "weights that are negative or not finite; expected numbers of at least 0"),
        (torch.full((2, 4), torch.nan), "weights that are negative or not finite"),
        (torch.full((2, 4), torch.inf), "weights that are negative or not finite"),
    ],
)
def test_weights_that_are_no_weights_are_refused_in_one_line(weights: torch.Tensor, message: str):
    with pytest.raises(DataError, match=message) as caught:
        complete_batch({"input_ids": IDS, "weights": weights})
    assert "\n" not in str(caught.value)


def test_labels_of_rows_are_refused_because_no_term_learns_from_them():
    with pytest.raises(DataError, match="a batch holds input_ids, row_labels; training takes input_ids, and labels"):
        complete_batch({"input_ids": IDS, "row_labels": torch.zeros(2, 1)})


def rows(weight: Callable[[int], float] | None) -> list[dict[str, Any]]:
    found = [{"input_ids": ids_of(12, seed)} for seed in range(8)]
    return [row | ({} if weight is None else {"weights": [weight(t) for t in range(12)]}) for row in found]


@pytest.fixture
def step_of(build_model: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Give the count of a step and the gradient of its batches, so many of so many rows."""

    def taken(dataset: list[dict[str, Any]], *, size: int, num_batches: int) -> tuple[float, dict[str, torch.Tensor]]:
        trainer = UniversalDistillationTrainer(
            model=build_model(seed=1, **NARROW),
            teacher_model=build_model(),
            layer_map=[1, 3],
            args=arguments(tmp_path, per_device_train_batch_size=size, seed=3),
            train_dataset=dataset,
        )
        trainer.model.train()
        batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), num_batches, CPU)
        for batch in batches:
            trainer.compute_loss(trainer.model, batch, num_items_in_batch=count).backward()
        return count, {name: value.grad for name, value in trainer.model.named_parameters() if value.grad is not None}

    return taken


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert (value - other[name]).abs().max() <= 1e-4 * value.abs().max(), name


def test_a_step_counts_the_sum_of_weights_and_the_number_of_positions_where_there_are_none(step_of):
    # Eight rows of twelve tokens, the first of which nothing predicts.
    count, _ = step_of(rows(None), size=4, num_batches=2)
    assert float(count) == 8 * 11
    count, _ = step_of(rows(lambda t: 0.25 if t < 6 else 0.5), size=4, num_batches=2)
    assert float(count) == pytest.approx(8 * (5 * 0.25 + 6 * 0.5))


def test_equal_weights_are_the_same_as_none_however_small(step_of):
    _, none = step_of(rows(None), size=4, num_batches=1)
    _, small = step_of(rows(lambda t: 0.001), size=4, num_batches=1)
    assert_close(none, small)


def test_weights_of_0_and_1_are_labels_that_are_ignored_or_not(step_of):
    _, weighted = step_of(rows(lambda t: float(t > 4)), size=4, num_batches=1)
    ignored = [{**row, "labels": [-100] * 5 + row["input_ids"][5:]} for row in rows(None)]
    _, labelled = step_of(ignored, size=4, num_batches=1)
    assert_close(weighted, labelled)


def test_accumulated_batches_have_the_gradient_of_one_whatever_each_weighs(step_of):
    weighted = [{**row, "weights": [0.1 + index * (t % 3) for t in range(12)]} for index, row in enumerate(rows(None))]
    one, whole = step_of(weighted, size=8, num_batches=1)
    four, parts = step_of(weighted, size=2, num_batches=4)
    assert float(one) == pytest.approx(float(four))
    assert_close(whole, parts)
