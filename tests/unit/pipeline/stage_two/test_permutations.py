"""Orders that are computed: every number once, by the seed alone, and in no pattern that one could see."""

import numpy as np
import pytest

from coldstill.pipeline.stage_two.permutations import Permutation


def order_of(size: int, *seed: int) -> np.ndarray:
    return Permutation(size, seed=seed)(np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 63, 64, 65, 1000, 4097, 100_000])
def test_every_number_stands_at_one_place(size: int):
    assert np.sort(order_of(size, 3, 1)).tolist() == list(range(size))


def test_the_seed_decides_the_order_and_a_part_of_it_is_that_of_the_whole():
    whole = order_of(5000, 7, 2)
    assert whole.tolist() == order_of(5000, 7, 2).tolist()
    assert Permutation(5000, seed=(7, 2))(np.arange(1200, 1300)).tolist() == whole[1200:1300].tolist()
    others = [order_of(5000, *seed) for seed in ((7, 3), (8, 2), (2, 7))]
    # Of two orders by chance about one place agrees.
    assert all((whole == other).sum() < 12 for other in others)


def test_an_order_is_as_even_as_one_by_chance():
    size, num_parts = 100_000, 20
    order = order_of(size, 1, 0)
    counts = np.array(
        [np.bincount(part * num_parts // size, minlength=num_parts) for part in np.split(order, num_parts)]
    )
    expected = size / num_parts**2
    chi_square = ((counts - expected) ** 2 / expected).sum() / (num_parts - 1) ** 2
    assert 0.75 < chi_square < 1.25
    # Neighbours are as far from each other as any two are, a third of all on average; and go up as often as down.
    steps = np.diff(order)
    assert np.abs(steps).mean() == pytest.approx(size / 3, rel=0.02)
    assert (steps > 0).mean() == pytest.approx(0.5, abs=0.01)
