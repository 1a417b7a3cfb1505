"""What stage one will write at least, held against the room on the disk."""

from pathlib import Path

import numpy as np
import pytest

from coldstill.cache.errors import NoRoomError
from coldstill.cache.local_objects import LocalObjects
from coldstill.cache.manifest import Manifest
from coldstill.cache.store import Store, create_store
from coldstill.cache.writer import write_column
from coldstill.pipeline.models.sizes import ModelSizes
from coldstill.pipeline.stage_one.room import least_bytes, require_room
from coldstill.pipeline.stage_one.shard_jobs import ShardJob
from coldstill.pipeline.targets.encodings import StateForm
from coldstill.pipeline.targets.states import BlockOutput
from coldstill.pipeline.targets.token_logits import Normaliser

SIZES = ModelSizes(width=16, vocab_size=384)
HIDDEN, NORMALISER = BlockOutput(StateForm("float32"), 3), Normaliser(1.0)
JOBS = [
    ShardJob("s0", 50, (HIDDEN, NORMALISER)),
    ShardJob("s1", 50, (HIDDEN,)),
]


class Disk(LocalObjects):
    """A disk with so much room; None is one that cannot say."""

    room: int | None = 0

    def free_bytes(self) -> int | None:
        return self.room


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = create_store(str(tmp_path), {"identity": {"weights": "w"}, "name": "t"})
    return Store(Disk(made.path), made.teacher)


def test_of_a_column_that_was_never_written_a_quarter_of_its_raw_bytes_counts(store: Store):
    needed = least_bytes(Manifest(store), SIZES, JOBS)
    assert needed == {HIDDEN.name: 0.25 * 100 * 16 * 4, NORMALISER.name: 0.25 * 50 * 4}


def test_of_a_column_that_the_store_has_elsewhere_what_it_takes_there_counts(store: Store):
    manifest = Manifest(store)
    values = {"values": np.random.default_rng(0).standard_normal((10, 16)).astype(np.float32)}
    record = write_column(store, manifest, "s9", HIDDEN.describe(SIZES), values, num_tokens=10, num_rows=1)
    needed = least_bytes(manifest, SIZES, JOBS)
    assert needed[HIDDEN.name] == pytest.approx(record.stored_bytes / 10 * 100)
    assert needed[HIDDEN.name] > 0.25 * 100 * 16 * 4, "random numbers do not compress to a quarter"


def test_a_run_that_just_fits_begins_and_one_byte_less_refuses_it_in_numbers(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    needed = round(sum(least_bytes(Manifest(store), SIZES, JOBS).values()))
    for room in (needed, None):
        monkeypatch.setattr(Disk, "room", room)
        require_room(store, Manifest(store), SIZES, JOBS)
    monkeypatch.setattr(Disk, "room", needed - 1)
    with pytest.raises(NoRoomError) as raised:
        require_room(store, Manifest(store), SIZES, JOBS)
    assert str(raised.value) == (
        f"precompute needs 0.0 GB more, {store.path} has 0.0 GB free; store fewer blocks or rows, or see: "
        "coldstill plan"
    )
