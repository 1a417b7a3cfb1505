"""What a batch's labels mean: those of transformers, shifted in one place."""

import pytest
import torch

from coldstill.pipeline.models.labels import IGNORED, counts_of, labels_of, next_tokens
from coldstill.pipeline.runtime.errors import DataError

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
RIGHT = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
LEFT = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])


def test_without_labels_every_token_counts_but_the_first_which_nothing_predicts():
    assert labels_of({"input_ids": IDS}).tolist() == [[IGNORED, 6, 7, 8], [IGNORED, 10, 11, 12]]


@pytest.mark.parametrize(
    ("mask", "second"),
    [(RIGHT, [IGNORED, 10, IGNORED, IGNORED]), (LEFT, [IGNORED, IGNORED, IGNORED, 12])],
    ids=["right", "left"],
)
def test_padding_does_not_count_nor_what_would_be_predicted_from_it(mask: torch.Tensor, second: list[int]):
    assert labels_of({"input_ids": IDS, "attention_mask": mask}).tolist() == [[IGNORED, 6, 7, 8], second]


def test_labels_that_are_there_are_kept_whatever_the_mask_says_and_never_changed():
    labels = torch.tensor([[5, IGNORED, 7, 8], [9, 10, 11, 12]])
    before = labels.clone()
    got = labels_of({"input_ids": IDS, "labels": labels, "attention_mask": RIGHT})
    assert got.tolist() == [[IGNORED, IGNORED, 7, 8], [IGNORED, 10, 11, 12]]
    assert torch.equal(labels, before)


def test_position_t_predicts_token_t_plus_one_and_the_last_nothing():
    batch = {"input_ids": IDS, "attention_mask": RIGHT}
    assert next_tokens(batch).tolist() == [[6, 7, 8, IGNORED], [10, IGNORED, IGNORED, IGNORED]]
    assert counts_of(batch).tolist() == [[True, True, True, False], [True, False, False, False]]


def test_labels_that_are_not_one_for_each_token_are_refused_with_both_shapes():
    with pytest.raises(DataError, match=r"labels of shape \[2, 3\] for input_ids of shape \[2, 4\]; expected one"):
        next_tokens({"input_ids": IDS, "labels": IDS[:, :3]})
