"""Who writes which shards at the moment, so that no two processes compute the same ones.

A writer keeps a small file in `writers/` that names its shards and changes every few seconds. On the same machine a
writer is known to be dead as soon as its process is gone; on another, when its file has not changed for a while. No
clocks are compared. A lease saves work, it does not guard the bytes: what is committed is never written again.
"""

import contextlib
import json
import random
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from coldstill.cache.errors import InUseError
from coldstill.cache.objects import Objects
from coldstill.cache.processes import describe_process, is_dead, process_token

LAYOUT = "rows"

_FOLDER = "writers"
BEAT_S = 5.0
SILENCE_S = 20.0
POLL_S = 0.2
_ATTEMPTS = 4


@dataclass(frozen=True)
class Writer:
    """A process that writes a store, as its file says.

    Attributes:
        file: The file's name.
        process: Its token; see `coldstill.cache.processes`.
        shards: What it writes.
        beat: A number that grows while it lives.
    """

    file: str
    process: str
    shards: frozenset[str]
    beat: int


class Lease:
    """The right to write some shards, as long as the `with` of `hold` lasts."""

    def __init__(self, objects: Objects, shards: Collection[str]) -> None:
        self._objects = objects
        self._shards = sorted(shards)
        self._name = f"{_FOLDER}/{uuid4().hex}.json"
        self._beat = 0
        self._is_lost = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="coldstill-lease", daemon=True)

    @property
    def file(self) -> str:
        """The name of its file in the folder of writers."""
        return self._name.rsplit("/", 1)[-1]

    def publish(self) -> None:
        """Tell others that these shards are being written."""
        content = {"process": process_token(), "shards": self._shards, "beat": self._beat}
        self._objects.write(self._name, json.dumps(content).encode())

    def start(self) -> None:
        """Begin to show that this process lives."""
        self._thread.start()

    def require(self) -> None:
        """Check that nobody took the lease for dead, as may happen to a process that was halted for long.

        Raises:
            InUseError: Another process took it.
        """
        if self._is_lost:
            raise InUseError(
                f"store {self._objects.root}: this process gave no sign of life for over {SILENCE_S:g} s and another "
                "took over its shards; what was committed stays; run the command again to go on"
            )

    def withdraw(self) -> None:
        """Release the shards."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        self._objects.remove(self._name)

    def _keep_beating(self) -> None:
        while not self._stopped.wait(BEAT_S):
            self._beat += 1
            with contextlib.suppress(OSError):  # the next beat tries again; a disk that stays full stops the writer
                self._is_lost = self._is_lost or not self._objects.exists(self._name)
                if not self._is_lost:
                    self.publish()


@contextlib.contextmanager
def hold(objects: Objects, shards: Collection[str], *, wait: bool = False) -> Iterator[Lease]:
    """Hold the right to write some shards; a writer that died gives its own up.

    Args:
        objects: The store's objects.
        shards: Names of shards, or `LAYOUT` for the laying of rows.
        wait: Whether to wait for a living writer of the same shards, rather than to be refused.

    Raises:
        InUseError: A living process writes one of them.
    """
    lease = _claimed(objects, shards, wait=wait)
    try:
        lease.start()
        yield lease
    finally:
        lease.withdraw()


def living_writers(objects: Objects) -> list[Writer]:
    """List the writers of a store that live or may live; files of those that are surely dead are removed."""
    writers = []
    for name in objects.files(_FOLDER):
        writer = _read(objects, name)
        if writer is None:
            continue
        if is_dead(writer.process):
            objects.remove(f"{_FOLDER}/{name}")
        else:
            writers.append(writer)
    return writers


def _claimed(objects: Objects, shards: Collection[str], *, wait: bool) -> Lease:
    """Publish a lease and look who else has one: of two that begin at once, at least one sees the other."""
    attempt = 0
    while True:
        lease = Lease(objects, shards)
        try:
            lease.publish()
            rivals = [writer for writer in living_writers(objects) if writer.file != lease.file]
            rivals = [writer for writer in rivals if writer.shards & set(shards)]
            if not rivals:
                return lease
        except BaseException:
            lease.withdraw()
            raise
        lease.withdraw()
        attempt += 1
        if not wait and attempt >= _ATTEMPTS:
            _refuse(objects, rivals[0], shards)
        _remove_silent(objects, [rival for rival in rivals if is_dead(rival.process) is None])
        # At random, so that two which began at once do not meet again.
        time.sleep(random.uniform(0.5, 1.5) * POLL_S)  # noqa: S311 - no secret


def _refuse(objects: Objects, rival: Writer, shards: Collection[str]) -> None:
    shared = sorted(rival.shards & set(shards))
    raise InUseError(
        f"store {objects.root} is in use: {describe_process(rival.process)} writes {len(shared)} of the same "
        f"{len(shards)} shards, such as {shared[0]}; wait for it, or give each process its share with --worker 1/2"
    )


def _remove_silent(objects: Objects, watched: list[Writer]) -> None:
    """Watch writers on other machines, and remove the files of those that show no sign of life."""
    deadline = time.monotonic() + SILENCE_S
    while watched and time.monotonic() < deadline:
        time.sleep(min(BEAT_S / 2, SILENCE_S))
        watched = [writer for writer in watched if _read(objects, writer.file) == writer]
    for writer in watched:
        objects.remove(f"{_FOLDER}/{writer.file}")


def _read(objects: Objects, name: str) -> Writer | None:
    try:
        content: dict[str, Any] = json.loads(objects.read(f"{_FOLDER}/{name}"))
        return Writer(name, str(content["process"]), frozenset(content["shards"]), int(content["beat"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OverflowError):
        # No writer leaves such a file; it names nobody who could be asked.
        objects.remove(f"{_FOLDER}/{name}")
        return None
