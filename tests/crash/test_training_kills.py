"""Training is killed at every publish, or at any moment, and ends with the same student when it is run again."""

import json
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from crash.killing import KILLED, PUBLISHES, REMOVALS, Place, Stop, all_stops, serving
from crash.trees import small_recipe
from forked import Forks

NUM_RANDOM_KILLS = 20


@pytest.fixture(scope="module")
def place(
    forks: Forks, tmp_path_factory: pytest.TempPathFactory, model_folders: dict[str, Path], corpus: list[str]
) -> Iterator[Place]:
    """A recipe of six steps with a checkpoint after every second one, of which the last is kept, and its store."""
    folder = tmp_path_factory.mktemp("training")
    train = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_steps": 2,
        "save_total_limit": 1,
    }
    recipe = small_recipe(
        folder,
        model_folders["teacher"],
        corpus[:30],
        student={"path": str(model_folders["narrow"])},
        targets={"logits": {"kind": "topk", "k": 4, "temperatures": [1]}},
        loss={"temperature": 1},
        train=train,
    )
    with serving(forks, folder, recipe) as place:
        yield place


@dataclass(frozen=True)
class Whole:
    """What training that nobody disturbs ends with, how often it publishes and removes, and how long it takes."""

    student: dict[str, bytes]
    losses: list[dict[str, float]]
    publishes: int
    removals: int
    seconds: float


def clear(place: Place) -> None:
    shutil.rmtree(place.folder / "run", ignore_errors=True)


def student(place: Place) -> dict[str, bytes]:
    """Give the exported student's files, but for the record of when it was made."""
    files = sorted((place.folder / "run/student").iterdir())
    return {file.name: file.read_bytes() for file in files if file.name != "provenance.json"}


def losses(place: Place) -> list[dict[str, float]]:
    """Give each step's losses, as the finished run says them."""
    log = json.loads((place.folder / "run/train.json").read_text())["log"]
    return [{name: entry[name] for name in entry if name.startswith("loss")} for entry in log if "loss" in entry]


def left_half_made(place: Place) -> list[Path]:
    checkpoints = (place.folder / "run/checkpoints").glob("checkpoint-*")
    unfinished = [folder for folder in checkpoints if not (folder / "trainer_state.json").is_file()]
    return [*unfinished, *(place.folder / "run").rglob("*.partial")]


@pytest.fixture(scope="module")
def whole(place: Place) -> Whole:
    clear(place)
    started = time.monotonic()
    ended = place.run("train")
    assert ended["exit_code"] == 0, (place.folder / "stderr").read_text()[-3000:]
    seconds = time.monotonic() - started
    return Whole(student(place), losses(place), ended["publishes"], ended["removals"], seconds)


def check_end(place: Place, whole: Whole, *, after: object) -> None:
    ended = place.run("train")
    assert ended["exit_code"] == 0, f"after a kill {after}: {(place.folder / 'stderr').read_text()[-3000:]}"
    assert student(place) == whole.student, f"after a kill {after}"
    assert losses(place) == whole.losses, f"after a kill {after}"
    assert left_half_made(place) == [], f"after a kill {after}"


def check_kills(place: Place, whole: Whole, stops: Sequence[Stop]) -> None:
    for stop in stops:
        clear(place)
        assert place.run("train", stop=asdict(stop))["exit_code"] == KILLED, f"the run was not killed {stop}"
        check_end(place, whole, after=stop)


def test_training_is_the_same_when_it_is_run_again(place: Place, whole: Whole):
    assert len(whole.losses) == 6
    assert whole.publishes > 6
    assert whole.removals > 6, "an older checkpoint is removed"
    clear(place)
    check_end(place, whole, after="none")


def test_training_killed_at_every_third_publish_ends_with_the_same_student(place: Place, whole: Whole):
    check_kills(place, whole, all_stops(PUBLISHES, whole.publishes)[::3])


@pytest.mark.slow
def test_training_killed_at_any_publish_ends_with_the_same_student(place: Place, whole: Whole):
    check_kills(place, whole, all_stops(PUBLISHES, whole.publishes))


@pytest.mark.slow
def test_training_killed_at_any_removal_ends_with_the_same_student(place: Place, whole: Whole):
    check_kills(place, whole, all_stops(REMOVALS, whole.removals))


@pytest.mark.slow
def test_training_killed_at_random_again_and_again_ends_with_the_same_student(place: Place, whole: Whole):
    num_kills = 0
    seed = random.randrange(1 << 32)
    while num_kills < NUM_RANDOM_KILLS:
        print(f"seed {seed}")  # noqa: T201 - shown where the test fails
        generator = random.Random(seed)
        clear(place)
        while True:
            ended = place.run("train", kill_after_s=generator.uniform(0.0, 1.1 * whole.seconds))
            if ended["exit_code"] == 0:
                break
            assert ended["exit_code"] == KILLED, f"seed {seed}: {(place.folder / 'stderr').read_text()[-3000:]}"
            num_kills += 1
        check_end(place, whole, after=f"at random, seed {seed}")
        seed += 1
