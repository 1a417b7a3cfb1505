"""The share of one process in the shards of all: disjoint, complete, and read as people and launchers write it."""

import pytest

from coldstill.pipeline.runtime.errors import RecipeError
from coldstill.pipeline.stage_one.workers import (
    Share,
    first_process_first,
    launched_share,
    parse_share,
    sum_over_processes,
    wait_for_everyone,
)

SHARDS = [f"s{number}" for number in range(10)]


@pytest.mark.parametrize("count", [1, 2, 3, 10, 13])
def test_shares_are_disjoint_equal_to_one_shard_and_together_everything(count: int):
    shares = [Share(index, count).of(SHARDS) for index in range(count)]
    assert sorted(shard for share in shares for shard in share) == SHARDS
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_by_default_a_process_does_everything():
    assert Share().of(SHARDS) == SHARDS


def test_a_share_is_read_as_people_count():
    assert [parse_share(f"{number}/3") for number in (1, 2, 3)] == [Share(0, 3), Share(1, 3), Share(2, 3)]


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/2/3", ""])
def test_what_is_no_share_is_refused_with_what_would_be_one(text: str):
    with pytest.raises(RecipeError, match=r"^--worker is '.*'; expected i/n with i from 1 to n, such as 1/4$"):
        parse_share(text)


def test_launchers_say_by_the_environment_which_process_this_is(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launched_share() == Share(0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launched_share() == Share(2, 4)


def test_a_process_alone_waits_for_nobody_and_adds_up_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with first_process_first():
        wait_for_everyone()
    assert sum_over_processes([3, 0, 7]) == [3, 0, 7]
