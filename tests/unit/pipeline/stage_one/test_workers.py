"""The share of one process in the shards of all: disjoint, complete, and read as people and launchers write it."""

from collections.abc import Callable

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
OF_SCHEDULERS = ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX")


@pytest.fixture(autouse=True)
def _no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OF_SCHEDULERS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def array(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say what SLURM says in a task of an array."""

    def say(task: object, *, least: int, largest: int, step: int, count: int) -> None:
        said = {"ID": task, "MIN": least, "MAX": largest, "STEP": step, "COUNT": count}
        for name, value in said.items():
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))

    return say


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


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/2/3", "", "auto/", "auto/x", "2/auto"])
def test_what_is_no_share_is_refused_with_what_would_be_one(text: str):
    with pytest.raises(RecipeError, match=r"^--worker is '.*'; expected i/n with i from 1 to n, such as 1/4, or auto"):
        parse_share(text)


@pytest.mark.parametrize(("first", "step", "largest"), [(0, 1, 3), (1, 1, 4), (3, 2, 9), (0, 5, 15), (0, 5, 19)])
@pytest.mark.parametrize("worker", ["auto", "auto/4"])
def test_the_tasks_of_a_slurm_array_are_its_workers_wherever_it_begins(
    array: Callable[..., None], worker: str, first: int, step: int, largest: int
):
    shares = []
    for number in range(4):
        array(first + step * number, least=first, largest=largest, step=step, count=4)
        shares.append(parse_share(worker))
    assert shares == [Share(index, 4) for index in range(4)]


def test_the_pods_of_an_indexed_job_are_its_workers_once_their_number_is_said(monkeypatch: pytest.MonkeyPatch):
    shares = []
    for index in range(3):
        monkeypatch.setenv("JOB_COMPLETION_INDEX", str(index))
        shares.append(parse_share("auto/3"))
    assert shares == [Share(0, 3), Share(1, 3), Share(2, 3)]
    with pytest.raises(RecipeError, match=r"\(JOB_COMPLETION_INDEX=2\), but not how many there are: write auto/n with"):
        parse_share("auto")
    with pytest.raises(
        RecipeError, match=r"^--worker is auto/2, and JOB_COMPLETION_INDEX is 2, which counts from 0: wri"
    ):
        parse_share("auto/2")


def test_without_a_scheduler_auto_is_refused_with_what_would_do():
    with pytest.raises(RecipeError, match="no scheduler says which worker this is: .* is set; write i/n, such as 1/4$"):
        parse_share("auto/4")


# Of --array=1,3,7 (whichever step SLURM makes of it), and of tasks that no array could have.
@pytest.mark.parametrize(
    ("task", "least", "largest", "step", "count"),
    [(3, 1, 7, 1, 3), (3, 1, 7, 2, 3), (4, 1, 7, 2, 4), (9, 1, 7, 2, 4), (0, 1, 7, 2, 4)],
)
def test_tasks_that_are_no_plain_range_are_refused(
    array: Callable[..., None], task: int, least: int, largest: int, step: int, count: int
):
    array(task, least=least, largest=largest, step=step, count=count)
    with pytest.raises(
        RecipeError, match=f"the array's {count} tasks from 1 to 7 are no plain range, so {task} does not"
    ):
        parse_share("auto")


def test_what_a_scheduler_does_not_say_as_it_should_is_refused(
    array: Callable[..., None], monkeypatch: pytest.MonkeyPatch
):
    array(1, least=1, largest=4, step=1, count=4)
    with pytest.raises(RecipeError, match=r"^--worker is auto/8, and SLURM's array has 4 tasks: write auto$"):
        parse_share("auto/8")
    monkeypatch.delenv("SLURM_ARRAY_TASK_COUNT")
    with pytest.raises(RecipeError, match="SLURM_ARRAY_TASK_ID is set, but not all of SLURM_ARRAY_TASK_MIN"):
        parse_share("auto")
    array("first", least=1, largest=4, step=1, count=4)
    with pytest.raises(RecipeError, match="SLURM_ARRAY_TASK_ID is 'first'; expected a number: write i/n"):
        parse_share("auto")


def test_the_processes_of_a_node_divide_the_share_of_their_worker():
    workers = [Share(index, 2) for index in range(2)]
    shares = [worker.part(Share(rank, 3)) for worker in workers for rank in range(3)]
    assert sorted(shard for share in shares for shard in share.of(SHARDS)) == SHARDS
    for worker in workers:
        parts = [shard for rank in range(3) for shard in worker.part(Share(rank, 3)).of(SHARDS)]
        assert sorted(parts) == sorted(worker.of(SHARDS))
    assert Share().part(Share(1, 4)) == Share(1, 4)


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
