"""NaN and infinity are found wherever they are, and large numbers are not taken for them."""

import pytest
import torch

from coldstill.pipeline.models.finite import all_finite, first_non_finite

BROKEN = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_number_in_any_tensor_is_found(value: float, dtype: torch.dtype):
    tensors = [torch.ones(3, 4, dtype=dtype) for _ in range(3)]
    assert all_finite(tensors)
    tensors[1][2, 3] = value
    assert not all_finite(tensors)
    assert first_non_finite({str(index): tensor for index, tensor in enumerate(tensors)}) == "1"


def test_two_infinities_do_not_make_up_for_each_other():
    assert not all_finite([torch.tensor([float("inf")]), torch.tensor([float("-inf")])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_sum_that_overflows_is_finite_where_its_numbers_are(dtype: torch.dtype):
    large = torch.full((1000,), 3e38, dtype=dtype)
    assert all_finite([large, -large])
    assert first_non_finite({"large": large}) is None


def test_what_has_no_numbers_is_finite():
    assert all_finite([])
    assert first_non_finite({"ids": torch.tensor([1, 2]), "later": torch.empty(2, device="meta")}) is None
