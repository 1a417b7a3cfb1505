"""Who may write which shards: one at a time, the next one when that one is done or dead."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from coldstill.cache import leases
from coldstill.cache.errors import InUseError
from coldstill.cache.leases import LAYOUT, Lease, hold, living_writers
from coldstill.cache.objects import Objects, open_objects
from coldstill.cache.processes import process_token

ELSEWHERE = "0123456789ab-77-1795341849970"

# A writer in a process of its own: it says when it holds its shards, and whether its lease still holds at each line
# that it is sent.
CHILD = """
import sys
from coldstill.cache import leases
from coldstill.cache.errors import InUseError
from coldstill.cache.objects import open_objects
root, token, beat_s, *shards = sys.argv[1:]
leases.BEAT_S = float(beat_s)
if token:
    leases.process_token = lambda: token
with leases.hold(open_objects(root), shards) as lease:
    print("held", flush=True)
    for _ in sys.stdin:
        try:
            lease.require()
        except InUseError as error:
            print(error, flush=True)
        else:
            print("still", flush=True)
"""

StartWriter = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(params=["local", "memory"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    return open_objects(tmp_path / "store" if request.param == "local" else f"memory://{uuid4().hex}/store")


@pytest.fixture
def local(tmp_path: Path) -> Objects:
    return open_objects(tmp_path / "store")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "BEAT_S", 0.05)
    monkeypatch.setattr(leases, "SILENCE_S", 0.3)
    monkeypatch.setattr(leases, "POLL_S", 0.02)


@pytest.fixture
def start_writer(local: Objects) -> Iterator[StartWriter]:
    """Start a process that holds shards of the local store."""
    with contextlib.ExitStack() as stack:

        def start(*shards: str, token: str = "", beat_s: float = 0.05) -> "subprocess.Popen[str]":
            command = [sys.executable, "-c", CHILD, local.root, token, str(beat_s), *shards]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            child = subprocess.Popen(command, **pipes)
            stack.enter_context(child)
            stack.callback(child.kill)
            assert child.stdout is not None
            assert child.stdout.readline() == "held\n"
            return child

        yield start


def ask(child: "subprocess.Popen[str]") -> str:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("\n")
    child.stdin.flush()
    return child.stdout.readline().strip()


def leave(objects: Objects, name: str, **changes: Any) -> None:
    """Leave the file of a writer."""
    content = {"process": ELSEWHERE, "shards": ["a"], "beat": 0, **changes}
    objects.write(f"writers/{name}.json", json.dumps(content).encode())


def writers(objects: Objects) -> list[str]:
    return objects.files("writers")


def test_a_lease_is_seen_while_it_is_held_and_gone_afterwards(objects: Objects):
    with hold(objects, ["b", "a"]) as lease:
        (writer,) = living_writers(objects)
        assert (writer.file, writer.process, writer.shards) == (lease.file, process_token(), {"a", "b"})
        lease.require()
    assert living_writers(objects) == []
    assert writers(objects) == []


def test_a_second_writer_of_the_same_shards_is_refused_and_told_who_writes_and_what_to_do(objects: Objects):
    with hold(objects, ["a", "b", "c"]):
        with pytest.raises(InUseError) as raised, hold(objects, ["c", "b", "d"]):
            pytest.fail("two hold the same shards")
        assert len(writers(objects)) == 1
    assert str(raised.value) == (
        f"store {objects.root} is in use: process {os.getpid()} writes 2 of the same 3 shards, such as b; "
        "wait for it, or give each process its share with --worker 1/2"
    )


def test_writers_of_disjoint_shards_do_not_meet(objects: Objects):
    started = time.monotonic()
    with hold(objects, ["a"]), hold(objects, ["b"]), hold(objects, [LAYOUT]):
        assert len(living_writers(objects)) == 3
    assert time.monotonic() - started < 1


def test_the_shards_are_free_for_the_next_as_soon_as_the_first_is_done(objects: Objects):
    for _ in range(3):
        with hold(objects, ["a"]):
            pass


def test_who_waits_gets_the_shards_when_the_first_is_done(objects: Objects):
    events = []
    is_held = threading.Event()

    def first() -> None:
        with hold(objects, ["a"]):
            is_held.set()
            time.sleep(0.5)
            events.append("first is done")

    thread = threading.Thread(target=first)
    thread.start()
    is_held.wait(5)
    with hold(objects, ["a"], wait=True):
        events.append("second begins")
    thread.join()
    assert events == ["first is done", "second begins"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_stays_of_a_writer_that_is_thrown_out(objects: Objects, error: type[BaseException]):
    with pytest.raises(error), hold(objects, ["a"]):
        raise error
    assert writers(objects) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "coldstill-lease"]


def test_nothing_stays_of_a_writer_that_is_interrupted_while_it_looks_around(
    local: Objects, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(self: Objects, folder: str) -> list[str]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(local), "files", interrupted)
        with pytest.raises(KeyboardInterrupt), hold(local, ["a"]):
            pytest.fail("it never looked")
    assert writers(local) == []


def test_nothing_stays_of_a_writer_that_is_interrupted_while_it_waits(
    objects: Objects, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(_seconds: float) -> None:
        raise KeyboardInterrupt

    with hold(objects, ["a"]) as first:
        with monkeypatch.context() as patch:
            patch.setattr("coldstill.cache.leases.time.sleep", interrupted)
            with pytest.raises(KeyboardInterrupt), hold(objects, ["a"], wait=True):
                pytest.fail("two hold the same shards")
        assert writers(objects) == [first.file]


def test_a_living_process_keeps_its_shards(local: Objects, start_writer: StartWriter):
    child = start_writer("a", "b")
    with pytest.raises(InUseError, match=f"process {child.pid} writes 1 of the same 1 shards, such as a;"):
        hold(local, ["a"]).__enter__()
    with hold(local, ["c"]):
        pass
    assert ask(child) == "still"


@pytest.mark.parametrize("is_waited_for", [True, False], ids=["reaped", "unreaped"])
def test_a_killed_process_gives_its_shards_up_at_once(
    local: Objects, start_writer: StartWriter, monkeypatch: pytest.MonkeyPatch, is_waited_for: bool
):
    monkeypatch.setattr(leases, "SILENCE_S", 60.0)
    child = start_writer("a")
    child.kill()
    if is_waited_for:
        child.wait()
    else:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert len(writers(local)) == 1
    started = time.monotonic()
    with hold(local, ["a"]) as lease:
        assert writers(local) == [lease.file]
    assert time.monotonic() - started < 2


def test_a_halted_process_of_this_machine_keeps_its_shards(local: Objects, start_writer: StartWriter):
    child = start_writer("a")
    child.send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    with pytest.raises(InUseError):
        hold(local, ["a"]).__enter__()
    child.send_signal(signal.SIGCONT)
    assert ask(child) == "still"


def test_a_process_that_ends_well_leaves_nothing(local: Objects, start_writer: StartWriter):
    child = start_writer("a")
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(10) == 0
    assert writers(local) == []


def test_a_silent_writer_on_another_machine_is_watched_and_then_taken_for_dead(objects: Objects):
    leave(objects, "silent")
    started = time.monotonic()
    with hold(objects, ["a"]) as lease:
        assert writers(objects) == [lease.file]
    assert time.monotonic() - started >= 0.3


def test_every_silent_writer_on_other_machines_is_taken_for_dead(objects: Objects):
    for number in range(3):
        leave(objects, f"silent{number}", shards=["a", f"b{number}"])
    with hold(objects, ["a"]) as lease:
        assert writers(objects) == [lease.file]


def test_a_silent_writer_of_other_shards_is_left_alone(objects: Objects):
    leave(objects, "silent", shards=["b"])
    started = time.monotonic()
    with hold(objects, ["a"]):
        assert "silent.json" in writers(objects)
    assert time.monotonic() - started < 0.3


def test_a_writer_on_another_machine_that_shows_life_keeps_its_shards(local: Objects, start_writer: StartWriter):
    child = start_writer("a", token=ELSEWHERE)
    with pytest.raises(InUseError, match="process 77 on another machine writes 1 of the same 1 shards"):
        hold(local, ["a"]).__enter__()
    assert len(writers(local)) == 1
    assert ask(child) == "still"


def test_a_writer_that_shows_life_seldom_but_often_enough_keeps_its_shards(
    local: Objects, start_writer: StartWriter, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(leases, "SILENCE_S", 1.2)
    child = start_writer("a", token=ELSEWHERE, beat_s=0.4)
    with pytest.raises(InUseError):
        hold(local, ["a"]).__enter__()
    assert ask(child) == "still"


def test_a_halted_writer_that_was_taken_over_notices_and_does_not_come_back(local: Objects, start_writer: StartWriter):
    child = start_writer("a", token=ELSEWHERE)
    child.send_signal(signal.SIGSTOP)
    with hold(local, ["a"]) as lease:
        child.send_signal(signal.SIGCONT)
        time.sleep(0.3)
        answer = ask(child)
        assert f"store {local.root}: this process gave no sign of life for over 20 s and another took over" in answer
        assert "what was committed stays; run the command again to go on" in answer
        assert writers(local) == [lease.file]
        lease.require()
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(10) == 0
        assert writers(local) == [lease.file], "it took the file of its successor away"


def test_a_beat_that_fails_does_not_end_the_lease(local: Objects, monkeypatch: pytest.MonkeyPatch):
    def refuses(*_: object) -> None:
        raise OSError("503 Slow Down")

    with hold(local, ["a"]) as lease:
        for method in ("write", "exists"):
            with monkeypatch.context() as patch:
                patch.setattr(type(local), method, refuses)
                time.sleep(0.2)
        before = beat_of(local, lease)
        time.sleep(0.2)
        lease.require()
        assert beat_of(local, lease) > before
    assert writers(local) == []


def beat_of(objects: Objects, lease: Lease) -> int:
    return next(writer.beat for writer in living_writers(objects) if writer.file == lease.file)


DAMAGED = {
    "empty": b"",
    "cut off": b'{"process": "0123',
    "no text": b"\xff\xfe\x00\x01",
    "null": b"null",
    "a list": b"[1, 2]",
    "a number": b"7",
    "no process": b'{"shards": ["a"], "beat": 0}',
    "no shards": b'{"process": "0123456789ab-77-1", "beat": 0}',
    "no beat": b'{"process": "0123456789ab-77-1", "shards": ["a"]}',
    "a process that is a number": b'{"process": 77, "shards": ["a"], "beat": 0}',
    "shards that are lists": b'{"process": "0123456789ab-77-1", "shards": [["a"]], "beat": 0}',
    "a beat without end": b'{"process": "0123456789ab-77-1", "shards": ["a"], "beat": Infinity}',
    "a beat that is a word": b'{"process": "0123456789ab-77-1", "shards": ["a"], "beat": "fast"}',
    "a process that is none": b'{"process": "nobody", "shards": ["a"], "beat": 0}',
    "a process id that is none": b'{"process": "MACHINE-\\u00b2-1", "shards": ["a"], "beat": 0}',
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_blocks_nobody_and_is_removed(objects: Objects, case: str):
    machine = process_token().split("-")[0]
    objects.write("writers/damaged.json", DAMAGED[case].replace(b"MACHINE", machine.encode()))
    with hold(objects, ["a"]) as lease:
        assert writers(objects) == [lease.file]


# Writers that race for shards of one store. Each holds a shard only if it can make the shard's own mark, which it takes
# away again: two that hold it at once meet there.
RACER = """
import os, random, sys, time
from pathlib import Path
from coldstill.cache import leases
from coldstill.cache.errors import InUseError
from coldstill.cache.objects import open_objects
root, marks, number = sys.argv[1:]
leases.POLL_S = 0.01
chance = random.Random(int(number))
held = refused = met = 0
Path(marks, f"ready{number}").touch()
while len(list(Path(marks).glob("ready*"))) < 4:
    time.sleep(0.001)
deadline = time.monotonic() + 1.2
while time.monotonic() < deadline:
    shards = chance.sample(["a", "b", "c"], chance.choice([1, 2]))
    try:
        with leases.hold(open_objects(root), shards, wait=chance.random() < 0.3) as lease:
            held += 1
            for shard in shards:
                try:
                    os.close(os.open(f"{marks}/{shard}", os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    met += 1
            time.sleep(0.002)
            lease.require()
            for shard in shards:
                Path(marks, shard).unlink(missing_ok=True)
    except InUseError:
        refused += 1
print(held, refused, met)
"""


def test_processes_that_race_never_hold_the_same_shard_at_once(local: Objects, tmp_path: Path):
    marks = tmp_path / "marks"
    marks.mkdir()
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, local.root, str(marks), str(number)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    results = [tuple(map(int, racer.communicate(timeout=60)[0].split())) for racer in racers]
    held, refused, met = map(sum, zip(*results, strict=True))
    assert met == 0
    assert held > 40, "they hardly raced"
    assert refused > 0
    assert writers(local) == []


def test_threads_that_race_over_a_url_never_hold_the_same_shard_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(leases, "POLL_S", 0.005)
    root = f"memory://{uuid4().hex}/store"
    holders: Counter[str] = Counter()
    guard = threading.Lock()
    seen: list[int] = []

    def race(number: int) -> None:
        chance = random.Random(number)
        for _ in range(12):
            shards = chance.sample(["a", "b", "c"], 2)
            with contextlib.suppress(InUseError), hold(open_objects(root), shards, wait=chance.random() < 0.5):
                with guard:
                    holders.update(shards)
                    seen.append(max(holders.values()))
                time.sleep(0.002)
                with guard:
                    holders.subtract(shards)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(seen) == 1
    assert len(seen) > 20
    assert writers(open_objects(root)) == []


def test_of_many_that_find_a_dead_writer_only_one_takes_over(local: Objects, start_writer: StartWriter):
    child = start_writer("a")
    child.kill()
    child.wait()
    inside: list[int] = []
    most: list[int] = []
    begin = threading.Barrier(5)

    def take_over(number: int) -> None:
        begin.wait()
        with hold(local, ["a"], wait=True):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.01)
            inside.remove(number)

    threads = [threading.Thread(target=take_over, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 5
