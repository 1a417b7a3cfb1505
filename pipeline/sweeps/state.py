"""What a sweep has done, in its folder: the plan, how each run ended, and which process carries it out."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from coldstill.cache.errors import InUseError
from coldstill.cache.leases import hold, living_writers
from coldstill.cache.objects import open_objects
from coldstill.cache.processes import describe_process, is_dead
from coldstill.pipeline.runtime.whole import write_whole
from coldstill.pipeline.sweeps.file import Sweep
from coldstill.pipeline.sweeps.results import FORMAT, SWEEP_FILE, Status, read_state

_LEASE = "sweep"
_POLL_S = 0.5
# Of a `PrecomputeSummary`, what adds up over the times that a sweep was continued.
_SUMS = ("computed_tokens", "written_bytes", "seconds")


@contextlib.contextmanager
def hold_sweep(folder: Path) -> Iterator[None]:
    """Hold the right to carry out the sweep of a folder.

    Raises:
        InUseError: A living process carries it out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    objects = open_objects(folder)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold(objects, [_LEASE]))
        except InUseError:
            rivals = ", ".join(describe_process(writer.process) for writer in living_writers(objects))
            raise InUseError(
                f"sweep {folder} is carried out by {rivals or 'another process'} already; wait for it, or stop it"
            ) from None
        yield


class SweepState:
    """The content of `sweep.json`: whatever changes is written at once, whole.

    Args:
        sweep: The sweep.
        keys: Variant and seed to the run's key.
    """

    def __init__(self, sweep: Sweep, keys: Mapping[tuple[str, int], str]) -> None:
        self._file = sweep.output / SWEEP_FILE
        earlier = read_state(sweep.output) or {"runs": {}, "precompute": None, "process": None}
        pending = {"status": "pending", "error": None, "student": None}
        self._content = {
            "format": FORMAT,
            "name": sweep.name,
            "variants": [
                {
                    "name": variant.name,
                    "changes": variant.changes,
                    "runs": [{"seed": seed, "key": keys[variant.name, seed]} for seed in variant.recipes],
                }
                for variant in sweep.variants
            ],
            "runs": {key: earlier["runs"].get(key, pending) for key in dict.fromkeys(keys.values())},
            "precompute": earlier["precompute"],
            "process": earlier["process"],
        }

    def wait_for_orphan(self, say: Callable[[str], None]) -> None:
        """Wait for the end of a command that still runs though the process that began it was killed."""
        token = self._content["process"]
        if token is not None and is_dead(token) is False:
            say(f"waiting for {describe_process(token)}, which an interrupted sweep left at work here")
            while is_dead(token) is False:
                time.sleep(_POLL_S)
        self.note_process(None)

    def status(self, key: str) -> Status:
        """Return how a run stands."""
        found: Status = self._content["runs"][key]["status"]
        return found

    def note(self, key: str, status: Status, error: str | None = None) -> None:
        """Write down how a run stands."""
        self._content["runs"][key] = {**self._content["runs"][key], "status": status, "error": error}
        self._write()

    def note_process(self, token: str | None) -> None:
        """Write down which process works for the sweep."""
        self._content["process"] = token
        self._write()

    def note_precompute(self, summary: Mapping[str, Any], keys: list[str]) -> None:
        """Write down what stage one did for some runs, and where their students are."""
        earlier = self._content["precompute"] or dict.fromkeys(_SUMS, 0)
        self._content["precompute"] = {**summary, **{name: earlier[name] + summary[name] for name in _SUMS}}
        for key, student in zip(keys, summary["students"], strict=True):
            self._content["runs"][key] = {**self._content["runs"][key], "student": student}
        self._write()

    def _write(self) -> None:
        write_whole(self._file, json.dumps(self._content, indent=1, default=str) + "\n")
