"""Commands in processes of their own, which hear signals, and what they say."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]
CHILD_TIMEOUT_S = 120


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run the command line in a process of its own, which hears SIGINT as at a terminal."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "coldstill.cli", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell lets what it starts in the background ignore SIGINT, and the tests may have been started so.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, env=environment, **pipes, **heard) as child:
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
