"""Measures of how alike states are, against what they must not depend on."""

import pytest
import torch

from coldstill.pipeline.judging.similarity_measures import cka_matrix, cosine_matrix, mean_cosine


def states(width: int, *, seed: int, num_positions: int = 200) -> torch.Tensor:
    return torch.randn(num_positions, width, generator=torch.Generator().manual_seed(seed))


def test_a_block_has_cosine_one_with_itself_and_minus_one_with_its_opposite():
    own = states(8, seed=0)
    assert cosine_matrix({0: own}, {3: own, 5: -3 * own})[0] == pytest.approx([1.0, -1.0])


def test_cosines_are_averaged_over_positions_and_not_over_the_whole_block():
    # One position a thousand times as large as the others counts as one position.
    own, other = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1000.0, 0.0], [1.0, 0.0]])
    assert cosine_matrix({0: own}, {0: other}) == [[pytest.approx(0.5)]]
    assert mean_cosine(own, other) == pytest.approx(0.5)


def test_rows_are_student_blocks_and_columns_teacher_blocks():
    one, other = states(8, seed=0), states(8, seed=1)
    matrix = cosine_matrix({0: one, 1: other}, {0: one, 1: other, 2: one})
    assert [len(row) for row in matrix] == [3, 3]
    assert matrix[0][2] == pytest.approx(1.0)
    assert matrix[1][1] == pytest.approx(1.0)
    assert abs(matrix[1][2]) < 0.2


def test_cka_does_not_see_rotation_scale_or_shift():
    own = states(8, seed=0)
    rotation, _ = torch.linalg.qr(states(8, seed=2, num_positions=8))
    assert cka_matrix({0: own}, {0: 30_000 * own @ rotation + 7})[0][0] == pytest.approx(1.0, abs=1e-4)


def test_cka_holds_states_of_two_widths_against_each_other():
    own = states(8, seed=0)
    wide = own @ states(12, seed=3, num_positions=8)
    unrelated = states(12, seed=4)
    ((related, chance),) = cka_matrix({0: own}, {0: wide, 1: unrelated})
    assert chance < 0.2 < 0.5 < related <= 1.0
