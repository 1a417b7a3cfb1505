"""Arms of a benchmark as processes that work in turns: one at a time, so that noise falls on all of them alike.

An arm prints one JSON object when it is ready, one for each turn that it is given, and a last one at its end.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any


class Turn:
    """An arm's process, seen from the benchmark; made, it is loaded and ready."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answer()

    def take(self) -> dict[str, Any]:
        """Let the arm work once, and give what it reports."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Read the arm's next report."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"an arm ended early: {self._command}")
        return dict(json.loads(line))


def wait_for_turn() -> None:
    """In an arm: wait until the benchmark gives a turn, and end with it."""
    if not sys.stdin.readline():
        raise SystemExit("nobody gives turns any more")


def reporting() -> Callable[[dict[str, Any]], None]:
    """In an arm: give what reports to the benchmark; whatever else is printed goes to standard error from now on."""
    reports, sys.stdout = sys.stdout, sys.stderr

    def report(values: dict[str, Any]) -> None:
        print(json.dumps(values), file=reports, flush=True)

    return report
