"""Least squares that stays with what there was where the data say nothing. Pure tensor arithmetic."""

import torch
from torch import Tensor


def solve_towards(prior_HO: Tensor, gram_HH: Tensor, cross_HO: Tensor, *, share: float) -> Tensor:
    """Solve (G + ridge) X = C + ridge * prior for X, [H, O], in the dtype of the operands.

    Args:
        prior_HO: What X is where the Gram matrix is nothing beside the ridge.
        gram_HH: Sum of products of inputs with inputs.
        cross_HO: Sum of products of inputs with what they should give.
        share: The ridge, of the mean of the Gram matrix's diagonal.
    """
    ridge = share * gram_HH.diagonal().mean()
    eye_HH = torch.eye(len(gram_HH), dtype=gram_HH.dtype, device=gram_HH.device)
    return torch.linalg.solve(gram_HH + ridge * eye_HH, cross_HO + ridge * prior_HO)
