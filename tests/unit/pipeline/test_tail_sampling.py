"""Draws from the tail: sums over them are, in expectation, sums over the tail."""

import pytest
import torch
from torch import Tensor

from pipeline.tail_sampling import draw_tail

V, K, M = 40, 4, 6
NUM_UNIFORMS = 20_000


def logits(scale: float = 2.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(V, generator=torch.Generator().manual_seed(seed))


def draws_of_every_uniform(row: Tensor, temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)) -> tuple[Tensor, Tensor, Tensor]:
    """The draws of one row for a fine grid of uniforms: each of its cells is one draw of systematic sampling."""
    rows = row.expand(NUM_UNIFORMS, V)
    uniforms = (torch.arange(NUM_UNIFORMS, dtype=torch.float64) + 0.5) / NUM_UNIFORMS
    top_ids = rows.topk(K, dim=-1).indices
    return draw_tail(rows, top_ids, temperatures=temperatures, num_draws=M, uniforms_C=uniforms)


@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 2.0, 4.0)], ids=str)
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_the_mean_of_weighted_sums_over_draws_is_the_sum_over_the_tail(scale, temperatures):
    row = logits(scale)
    _, ids, log_weights = draws_of_every_uniform(row, temperatures)
    in_tail = torch.ones(V, dtype=torch.float64).scatter(0, row.topk(K).indices, 0.0)
    for seed in range(5):
        values = torch.randn(V, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)
        mean = (log_weights.double().exp() * values[ids]).sum(-1).mean()
        largest_weight = log_weights.exp().max().item()
        # A token's share of the grid is exact to one cell at each of its two ends.
        assert mean == pytest.approx((values * in_tail).sum().item(), abs=3 * V * largest_weight / NUM_UNIFORMS)
    counts = torch.zeros(V, dtype=torch.float64).scatter_add(0, ids.flatten(), log_weights.double().exp().flatten())
    assert torch.allclose(counts / NUM_UNIFORMS, in_tail, atol=0.02)


def test_the_likeliest_tokens_are_never_drawn_and_ids_ascend():
    row = logits()
    drawn_logits, ids, _ = draws_of_every_uniform(row)
    assert not torch.isin(ids, row.topk(K).indices).any()
    assert (ids.diff(dim=-1) >= 0).all()
    assert torch.equal(drawn_logits, row[ids])


def test_a_weight_is_one_over_the_expected_count():
    row, temperatures = logits(), (1.0, 4.0)
    _, ids, log_weights = draws_of_every_uniform(row, temperatures)
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
    _, ids, log_weights = draw_tail(
        row, top_ids, temperatures=(1.0,), num_draws=M, uniforms_C=torch.tensor([uniform])
    )
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
