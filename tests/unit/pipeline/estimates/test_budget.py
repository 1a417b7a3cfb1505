"""Which targets fit a number of bytes: the most faithful first, and what sizes people write."""

import pytest

from coldstill.pipeline.estimates.budget import HiddenOption, LogitsOption, Proposal, parse_bytes, proposals

EXACT = LogitsOption("targets.logits.kind=final", 200.0, 0.9999)
COARSE = LogitsOption("targets.logits.kind=final targets.logits.step=0.08", 100.0, 0.9995)
TOP = LogitsOption("targets.logits.kind=topk", 50.0, 0.95)
FINE_STATES = HiddenOption("targets.hidden.encoding=int8", 40.0, 0.001, 4)
COARSE_STATES = HiddenOption("targets.hidden.encoding=coded", 10.0, 0.01, 4)
NUM_TOKENS = 1000


def fitting(budget: float, *, hidden: tuple[HiddenOption, ...] = (FINE_STATES, COARSE_STATES)) -> list[Proposal]:
    return proposals(budget, NUM_TOKENS, 8.0, [TOP, EXACT, COARSE], hidden)


def test_with_room_for_all_the_most_faithful_of_everything_comes_first():
    best = fitting(1e9)[0]
    assert best.overrides == f"{EXACT.setting} {FINE_STATES.setting}"
    assert best.bytes_per_token == 8 + 200 + 4 * 40
    assert best.total_bytes == 368_000
    assert (best.grad_cosine, best.num_blocks, best.hidden_error) == (0.9999, 4, 0.001)


def test_nothing_that_is_proposed_exceeds_the_budget_and_the_budget_itself_fits():
    for budget in (368_000, 300_000, 120_000, 60_000):
        found = fitting(budget)
        assert 0 < len(found) <= 5
        assert all(proposal.total_bytes <= budget for proposal in found)
    assert fitting(368_000)[0].total_bytes == 368_000
    assert fitting(367_999)[0].total_bytes < 367_999


def test_beyond_a_cosine_that_is_faithful_enough_blocks_are_worth_more_than_a_better_one():
    """268 bytes pay for exact logits with one fine block, or for coarser ones with all four."""
    best = fitting(268_000)[0]
    assert best.overrides == f"{COARSE.setting} {FINE_STATES.setting}"
    assert best.num_blocks == 4


def test_logits_that_are_not_faithful_are_never_bought_for_the_sake_of_blocks():
    """Of 118 bytes, coarse logits leave room for one coarse block, the largest logits for all four."""
    best = fitting(118_000)[0]
    assert best.overrides == f"{COARSE.setting} {COARSE_STATES.setting} mapping.num_pairs=1"


def test_without_blocks_their_term_of_the_loss_goes_too():
    best = fitting(59_000)[0]
    assert best.overrides == f"{TOP.setting} targets.hidden.blocks=none loss.gamma=0"
    assert (best.num_blocks, best.hidden_error) == (0, None)
    assert {proposal.num_blocks for proposal in fitting(1e9, hidden=())} == {0}


def test_where_nothing_fits_the_smallest_of_all_says_how_much_is_too_much():
    (smallest,) = fitting(1000)
    assert smallest.total_bytes == 58_000


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("50GB", 50 * 10**9), ("1.5 TB", 15 * 10**11), ("800mb", 8 * 10**8), (" 12 kB ", 12_000), ("77", 77), ("9B", 9)],
)
def test_sizes_are_read_as_people_write_them(text: str, num_bytes: int):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["lots", "", "-3GB", "0", "5 parsecs", "GB", "1e3XB"])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(ValueError, match=r"is no size; expected "):
        parse_bytes(text)
