"""Stored tokens come back: ids exactly, logits within the error that their column states."""

import pytest
import torch

from coldstill.pipeline.targets.token_encodings import (
    decode_tail,
    decode_topk,
    encode_tail,
    encode_topk,
    tail_column,
    topk_column,
)

N, K, M = 60, 16, 12
# One, two, three and again three byte planes of ids; 256 and 65,536 are the last that fit one and two.
VOCABULARIES = {200: 1, 256: 1, 257: 2, 65_536: 2, 70_000: 3, 200_000: 3}
NUM_LOGITS = 3000


def largest(vocab_size: int, scale: float = 20.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The K largest of some logits, with ids that reach over the whole vocabulary, the last one among them."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits = scale * torch.randn(N, min(vocab_size, NUM_LOGITS), generator=generator)
    values = logits.topk(K, dim=-1).values
    ids = torch.stack([torch.randperm(vocab_size, generator=generator)[:K] for _ in range(N)])
    ids[0, 0] = vocab_size - 1
    return values, ids


@pytest.mark.parametrize("values", ["delta", "float32"])
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_largest_logits_come_back_within_their_error_and_a_prefix_is_a_smaller_k(values, vocab_size):
    top_logits, top_ids = largest(vocab_size)
    column = topk_column("logits/topk/16/x", k=K, values=values, vocab_size=vocab_size)
    arrays = encode_topk(top_logits, top_ids, column=column)
    assert arrays.keys() == column.arrays.keys()
    for name, spec in column.arrays.items():
        assert str(arrays[name].dtype) == f"torch.{spec.dtype}"
        assert tuple(arrays[name].shape) == spec.full_shape(num_tokens=N, num_rows=1)
    assert sum(name.startswith("ids_") for name in arrays) == VOCABULARIES[vocab_size]
    decoded, ids = decode_topk(arrays, k=K)
    bound = 0.01 + 4e-6 if values == "delta" else 0.0
    assert ((decoded - top_logits).abs() <= bound).all()
    assert torch.equal(ids, top_ids)
    assert torch.equal(decoded[:, 0], top_logits[:, 0]), "the maximum is exact"
    assert (decoded.diff(dim=1) <= 0).all()
    for k in (1, 4):
        fewer, fewer_ids = decode_topk(arrays, k=k)
        assert torch.equal(fewer, decoded[:, :k])
        assert torch.equal(fewer_ids, ids[:, :k])


def test_errors_of_many_gaps_do_not_add_up():
    # Gaps of 1.4 steps: each rounded alone, 0.4 steps would be lost each time.
    top_logits = -0.028 * torch.arange(1000.0).unsqueeze(0)
    column = topk_column("logits/topk/1000/delta", k=1000, values="delta", vocab_size=70_000)
    decoded, _ = decode_topk(encode_topk(top_logits, torch.arange(1000).unsqueeze(0), column=column), k=1000)
    assert (decoded - top_logits).abs().max() <= 0.01 + 4e-6


def test_a_batch_of_rows_decodes_as_its_rows_do():
    top_logits, top_ids = largest(70_000)
    column = topk_column("logits/topk/16/delta", k=K, values="delta", vocab_size=70_000)
    arrays = encode_topk(top_logits, top_ids, column=column)
    values, ids = decode_topk(arrays, k=K)
    batch = {name: array.unflatten(0, (4, N // 4)) for name, array in arrays.items()}
    assert torch.equal(decode_topk(batch, k=K)[0].flatten(0, 1), values)
    assert torch.equal(decode_topk(batch, k=K)[1].flatten(0, 1), ids)


@pytest.mark.parametrize("gap", [200.0, 1300.0])
def test_a_gap_of_more_than_a_byte_is_held(gap):
    top_logits = torch.tensor([[10.0, 10.0 - gap, 9.0 - gap]])
    column = topk_column("logits/topk/3/delta", k=3, values="delta", vocab_size=200)
    arrays = encode_topk(top_logits, torch.arange(3).unsqueeze(0), column=column)
    assert arrays["gaps_1"].count_nonzero() == 1
    assert (decode_topk(arrays, k=3)[0] - top_logits).abs().max() <= 0.01 + 2e-4


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_draws_come_back_in_any_order_within_their_error(vocab_size):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = 20 * torch.randn(N, M, generator=generator)
    ids = torch.randint(vocab_size, (N, M), generator=generator)
    ids[0, 0] = vocab_size - 1
    log_weights = 3 * torch.randn(N, M, generator=generator)
    column = tail_column("logits/tail/16_12/1", num_draws=M, vocab_size=vocab_size)
    arrays = encode_tail(logits, ids, log_weights, column=column)
    assert arrays.keys() == column.arrays.keys()
    for name, spec in column.arrays.items():
        assert str(arrays[name].dtype) == f"torch.{spec.dtype}"
        assert tuple(arrays[name].shape) == spec.full_shape(num_tokens=N, num_rows=1)
    assert sum(name.startswith("ids_") for name in arrays) == VOCABULARIES[vocab_size]
    got_logits, got_ids, got_weights = decode_tail(arrays)
    assert ((got_logits - logits).abs() <= 0.01 + 8e-6).all()
    assert torch.equal(got_ids, ids)
    assert ((got_weights - log_weights).abs() <= 2**-11 * log_weights.abs() + 2**-25).all()


def test_logits_too_far_apart_are_refused_with_their_distance():
    far = torch.tensor([[0.0, -1400.0]])
    message = r"^logits 1400 nats apart are beyond 65,535 steps of 0\.02$"
    ids = torch.arange(2).unsqueeze(0)
    column = topk_column("logits/topk/2/delta", k=2, values="delta", vocab_size=200)
    with pytest.raises(OverflowError, match=message):
        encode_topk(far, ids, column=column)
    column = tail_column("logits/tail/1_2/1", num_draws=2, vocab_size=200)
    with pytest.raises(OverflowError, match=message):
        encode_tail(far, ids, torch.zeros(1, 2), column=column)


def test_neighbours_that_are_near_may_reach_further_than_one_gap_does():
    top_logits = -1000.0 * torch.arange(4.0).unsqueeze(0)
    column = topk_column("logits/topk/4/delta", k=4, values="delta", vocab_size=200)
    decoded, _ = decode_topk(encode_topk(top_logits, torch.arange(4).unsqueeze(0), column=column), k=4)
    assert (decoded - top_logits).abs().max() <= 0.01 + 3e-4
