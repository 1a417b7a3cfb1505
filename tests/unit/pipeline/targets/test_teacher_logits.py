"""The largest logits and the logsumexps of a teacher, against torch's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coldstill.pipeline.targets.teacher_logits import largest_logits, logsumexp_at


def random(*shape: int, seed: int = 0, scale: float = 4.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("vocab_size", [30, 255, 256, 1024, 1100, 4099])
@pytest.mark.parametrize("k", [1, 3, 16])
def test_the_largest_logits_are_torchs(vocab_size: int, k: int):
    logits = random(7, vocab_size)
    values, ids = largest_logits(logits, k)
    want = logits.topk(k)
    assert torch.equal(values, want.values)
    assert torch.equal(ids, want.indices)


@settings(deadline=None, max_examples=80)
@given(seed=st.integers(0, 10_000), levels=st.integers(1, 6), vocab_size=st.integers(260, 900), k=st.integers(1, 5))
def test_where_logits_tie_the_values_are_the_largest_and_the_ids_are_theirs(seed, levels, vocab_size, k):
    logits = torch.randint(levels, (3, vocab_size), generator=torch.Generator().manual_seed(seed)).float()
    values, ids = largest_logits(logits, k)
    assert torch.equal(values, logits.topk(k).values)
    assert torch.equal(logits.gather(-1, ids), values)
    assert all(len(set(row)) == k for row in ids.tolist())


def test_all_large_logits_in_one_group_are_found():
    logits = random(2, 2048)
    logits[:, 640:704] += 100
    assert torch.equal(largest_logits(logits, 8)[1], logits.topk(8).indices)


def test_the_end_of_a_vocabulary_that_no_group_holds_is_looked_at():
    logits = random(2, 2048 + 5)
    logits[:, -2] = 99.0
    assert largest_logits(logits, 4)[1][:, 0].tolist() == [2051, 2051]


@pytest.mark.parametrize("rows_of_a_block", [1, 3, 100])
@pytest.mark.parametrize(
    "temperatures",
    [[1.0], [2.0], [1.0, 2.0, 3.0, 4.0], [4.0, 1.0], [1.0, 8.0], [1.0, 5.0, 7.0], [0.5, 1.0], [1.5], [3.0, 2.5]],
    ids=str,
)
def test_logsumexps_are_torchs(temperatures: list[float], rows_of_a_block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("coldstill.pipeline.models.row_blocks.BLOCK_BYTES", 4 * 500 * rows_of_a_block)
    logits = random(8, 500) + 30
    got = logsumexp_at(logits, temperatures)
    assert set(got) == set(temperatures)
    for temperature in temperatures:
        want = (logits.double() / temperature).logsumexp(-1)
        torch.testing.assert_close(got[temperature].double(), want, rtol=0, atol=1e-5)


def test_no_temperatures_need_nothing():
    assert logsumexp_at(random(2, 10), []) == {}


def test_the_logits_stay_as_they_are():
    logits = random(3, 2000)
    before = logits.clone()
    largest_logits(logits, 4)
    logsumexp_at(logits, [1.0, 2.0])
    assert torch.equal(logits, before)
