"""Draws from the tail: sums over them are, in expectation, sums over the tail."""

import pytest
import torch
from torch import Tensor

from coldstill.pipeline.targets.tail_sampling import draw_tail

V, K, M = 40, 4, 6
TEMPERATURES = (1.0, 2.0, 4.0)


def logits(scale: float = 2.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(V, generator=torch.Generator().manual_seed(seed))


def draws(
    row: Tensor, uniforms: Tensor, temperatures: tuple[float, ...] = TEMPERATURES
) -> tuple[Tensor, Tensor, Tensor]:
    rows = row.expand(len(uniforms), V)
    top_ids = rows.topk(K, dim=-1).indices
    return draw_tail(rows, top_ids, temperatures=temperatures, num_draws=M, uniforms_C=uniforms)


@pytest.mark.parametrize("temperatures", [(1.0,), TEMPERATURES], ids=str)
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_the_mean_of_weighted_sums_over_draws_is_the_sum_over_the_tail(cells, scale, temperatures):
    row = logits(scale)
    uniforms, probabilities = cells(row, k=K, temperatures=temperatures, num_draws=M)
    _, ids, log_weights = draws(row, uniforms, temperatures)
    counts = log_weights.double().exp() * probabilities.unsqueeze(-1)
    in_tail = torch.ones(V, dtype=torch.float64).scatter(0, row.topk(K).indices, 0.0)
    expected = torch.zeros(V, dtype=torch.float64).scatter_add(0, ids.flatten(), counts.flatten())
    assert torch.allclose(expected, in_tail, rtol=0, atol=1e-4), "each token of the tail counts once"
    values = torch.randn(V, generator=torch.Generator().manual_seed(100), dtype=torch.float64)
    assert (counts * values[ids]).sum().item() == pytest.approx((values * in_tail).sum().item(), abs=1e-4)


def test_a_fine_grid_of_uniforms_gives_the_same_mean():
    """The expectation without any knowledge of where draws change."""
    row, num_uniforms = logits(0.5), 20_000
    uniforms = (torch.arange(num_uniforms, dtype=torch.float64) + 0.5) / num_uniforms
    _, ids, log_weights = draws(row, uniforms)
    counts = torch.zeros(V, dtype=torch.float64).scatter_add(0, ids.flatten(), log_weights.double().exp().flatten())
    in_tail = torch.ones(V, dtype=torch.float64).scatter(0, row.topk(K).indices, 0.0)
    # A token's share of the grid is exact to one of its points at each end.
    assert torch.allclose(counts / num_uniforms, in_tail, rtol=0, atol=2 * log_weights.exp().max() / num_uniforms)


def test_the_likeliest_tokens_are_never_drawn_and_ids_ascend():
    row = logits()
    drawn_logits, ids, _ = draws(row, torch.linspace(0, 1 - 2**-24, 1001))
    assert not torch.isin(ids, row.topk(K).indices).any()
    assert (ids.diff(dim=-1) >= 0).all()
    assert torch.equal(drawn_logits, row[ids])


def test_a_weight_is_one_over_the_expected_count():
    row, temperatures = logits(), (1.0, 4.0)
    _, ids, log_weights = draws(row, torch.linspace(0, 1 - 2**-24, 101), temperatures)
    tail = row.double().scatter(0, row.topk(K).indices, -torch.inf)
    proposal = torch.stack([(tail / temperature).softmax(-1) for temperature in temperatures]).mean(0)
    assert torch.allclose(log_weights.double(), -(M * proposal[ids]).log(), atol=1e-4)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
@pytest.mark.parametrize("peak", ["head", "tail"])
def test_a_peaked_row_gives_finite_draws(uniform, peak):
    row = logits()
    order = row.argsort(descending=True)
    if peak == "head":
        row[order[0]] += 100.0
    else:
        row[order[:K]] += 300.0
        row[order[K]] += 100.0
    top_ids = row.topk(K).indices.unsqueeze(0)
    drawn, ids, log_weights = draw_tail(
        row.unsqueeze(0), top_ids, temperatures=(1.0, 2.0), num_draws=M, uniforms_C=torch.tensor([uniform])
    )
    assert torch.isfinite(drawn).all()
    assert torch.isfinite(log_weights).all()
    assert not torch.isin(ids, top_ids).any()
    assert (log_weights < 65504).all(), "float16 holds them"


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_a_tail_of_one_token_is_drawn_each_time(uniform):
    row = logits().unsqueeze(0)
    top_ids = row.topk(V - 1).indices
    (last,) = set(range(V)) - set(top_ids[0].tolist())
    _, ids, log_weights = draw_tail(row, top_ids, temperatures=(1.0,), num_draws=M, uniforms_C=torch.tensor([uniform]))
    assert (ids == last).all()
    assert torch.allclose(log_weights.exp().sum(), torch.tensor(1.0))


def test_a_uniform_decides_its_row_alone():
    rows = torch.stack([logits(seed=seed) for seed in range(3)])
    top_ids = rows.topk(K).indices
    uniforms = torch.tensor([0.1, 0.5, 0.9])
    together = draw_tail(rows, top_ids, temperatures=(1.0,), num_draws=M, uniforms_C=uniforms)
    for index in range(3):
        one = slice(index, index + 1)
        alone = draw_tail(rows[one], top_ids[one], temperatures=(1.0,), num_draws=M, uniforms_C=uniforms[one])
        for got, want in zip(alone, together, strict=True):
            assert torch.equal(got, want[one])
