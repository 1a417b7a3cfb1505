"""Commands in processes of their own, which hear signals, and what they say."""

import contextlib
import subprocess
from collections.abc import Iterator
from typing import IO

from forked import Forks

CHILD_TIMEOUT_S = 120


@contextlib.contextmanager
def started(forks: Forks, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run the command line in a process of its own, which hears SIGINT as at a terminal."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(forks.command("coldstill.cli", *arguments), **pipes) as child:
        try:
            yield child
        finally:
            child.kill()


def read_until(stream: IO[str], said: str) -> None:
    """Read what a process says, up to some words."""
    heard = ""
    while not heard.endswith(said):
        letter = stream.read(1)
        assert letter, f"never said {said!r}: {heard}"
        heard += letter


def last_line(stderr: str) -> str:
    return [line for line in stderr.splitlines() if line.strip()][-1]
