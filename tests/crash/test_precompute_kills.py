"""`precompute` is killed at every publish, or at any moment, and comes to the same bytes when it is run again."""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from crash.killing import KILLED, PUBLISHES, REMOVALS, Place, Stop, all_stops, serving
from crash.trees import difference, lasting_files_below, small_recipe
from forked import Forks

NUM_RANDOM_KILLS = 50


@pytest.fixture(scope="module", params=["whole", "streamed"])
def place(
    request: pytest.FixtureRequest,
    forks: Forks,
    tmp_path_factory: pytest.TempPathFactory,
    model_folders: dict[str, Path],
    corpus: list[str],
) -> Iterator[Place]:
    """A recipe of three shards and few columns, and the server that runs it; the teacher whole, or streaming in."""
    folder = tmp_path_factory.mktemp("kills")
    # Coded columns, so that the calibrations are among what is killed.
    targets = {"logits": {"kind": "final"}, "hidden": {"blocks": [1], "encoding": "coded", "token_fraction": 0.5}}
    recipe = small_recipe(folder, model_folders["teacher"], corpus[:30], targets=targets)
    recipe["teacher"]["placement"] = request.param
    with serving(forks, folder, recipe) as place:
        yield place


@dataclass(frozen=True)
class Whole:
    """What a run that nobody disturbs leaves, how often it publishes and removes, and how long it takes."""

    files: dict[str, bytes]
    publishes: int
    removals: int
    seconds: float


@pytest.fixture(scope="module")
def whole(place: Place) -> Whole:
    place.clear()
    started = time.monotonic()
    ended = place.run()
    seconds = time.monotonic() - started
    assert ended["exit_code"] == 0
    return Whole(lasting_files_below(place.root), ended["publishes"], ended["removals"], seconds)


def check_kills(place: Place, whole: Whole, stops: Sequence[Stop]) -> None:
    for stop in stops:
        place.clear()
        assert place.run(stop=asdict(stop))["exit_code"] == KILLED, f"the run was not killed {stop}"
        place.complete(after=stop)
        assert difference(lasting_files_below(place.root), whole.files) == {}, f"after a kill {stop}"


def test_the_run_has_three_shards_and_is_the_same_when_it_is_run_again(place: Place, whole: Whole):
    shards = {name.split("/shards/")[1].split("/")[0] for name in whole.files if name.endswith("/tokens/zarr.json")}
    assert len(shards) == 3
    assert whole.publishes > len(whole.files)
    assert whole.removals > 10
    assert not [name for name in whole.files if ".partial" in name or "writers/" in name]
    place.clear()
    assert place.run()["exit_code"] == 0
    assert difference(lasting_files_below(place.root), whole.files) == {}


def test_a_run_killed_at_every_seventh_publish_comes_to_the_same_bytes(place: Place, whole: Whole):
    check_kills(place, whole, all_stops(PUBLISHES, whole.publishes)[::7])


@pytest.mark.slow
def test_a_run_killed_at_any_publish_comes_to_the_same_bytes(place: Place, whole: Whole):
    check_kills(place, whole, all_stops(PUBLISHES, whole.publishes))


@pytest.mark.slow
def test_a_run_killed_at_any_removal_comes_to_the_same_bytes(place: Place, whole: Whole):
    check_kills(place, whole, all_stops(REMOVALS, whole.removals))


@pytest.mark.slow
def test_a_run_killed_at_random_again_and_again_comes_to_the_same_bytes(place: Place, whole: Whole):
    num_kills = 0
    seed = random.randrange(1 << 32)
    while num_kills < NUM_RANDOM_KILLS:
        print(f"seed {seed}")  # noqa: T201 - shown where the test fails
        generator = random.Random(seed)
        place.clear()
        kills: list[float] = []
        while True:
            after_s = generator.uniform(0.0, 1.2 * whole.seconds)
            has_store = any(place.root.glob("stores/*")) or any(place.root.glob("index/*"))
            ended = place.run(kill_after_s=after_s, verify=str(place.root) if has_store else None)
            if ended["exit_code"] == 0:
                break
            assert ended["exit_code"] == KILLED, f"seed {seed}: {(place.folder / 'stderr').read_text()[-3000:]}"
            kills.append(after_s)
        assert difference(lasting_files_below(place.root), whole.files) == {}, f"seed {seed}, kills after {kills} s"
        num_kills += len(kills)
        seed += 1


def test_a_run_killed_just_before_its_record_leaves_it_to_the_next_run(place: Place, whole: Whole):
    place.clear()
    # The last two publishes of a run are the resolved recipe and the provenance beside its output.
    stop = Stop(PUBLISHES, whole.publishes, after=False)
    assert place.run(stop=asdict(stop))["exit_code"] == KILLED
    place.complete(after=stop)
    names = sorted(path.name for path in (place.folder / "run/precompute").iterdir())
    assert names == ["provenance.json", "recipe.yaml"]
