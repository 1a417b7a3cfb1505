"""Least squares with a prior: what the data say where they say something, what was there where they do not."""

import torch

from coldstill.pipeline.students.ridge import solve_towards

GENERATOR = torch.Generator().manual_seed(0)
PRIOR_HO = torch.randn(3, 2, generator=GENERATOR).double()
TRUE_HO = torch.randn(3, 2, generator=GENERATOR).double()


def sums(inputs_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return inputs_NH.T @ inputs_NH, inputs_NH.T @ (inputs_NH @ TRUE_HO)


def test_without_a_ridge_it_is_least_squares():
    inputs_NH = torch.randn(20, 3, generator=GENERATOR).double()
    torch.testing.assert_close(solve_towards(PRIOR_HO, *sums(inputs_NH), share=0.0), TRUE_HO)


def test_what_no_input_ever_touches_stays_as_it_was():
    inputs_NH = torch.randn(20, 3, generator=GENERATOR).double()
    inputs_NH[:, 2] = 0
    solved_HO = solve_towards(PRIOR_HO, *sums(inputs_NH), share=1e-6)
    torch.testing.assert_close(solved_HO[2], PRIOR_HO[2])
    torch.testing.assert_close(solved_HO[:2], TRUE_HO[:2], rtol=1e-4, atol=1e-4)


def test_the_larger_the_ridge_the_nearer_to_the_prior_whatever_the_scale_of_the_inputs():
    inputs_NH = torch.randn(20, 3, generator=GENERATOR).double()
    near, far = (solve_towards(PRIOR_HO, *sums(inputs_NH), share=share) for share in (100.0, 0.1))
    assert (near - PRIOR_HO).norm() < 0.1 * (far - PRIOR_HO).norm()
    torch.testing.assert_close(solve_towards(PRIOR_HO, *sums(1000 * inputs_NH), share=0.1), far)
