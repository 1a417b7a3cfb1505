"""A command of this program in a process of its own: its memory is its own, and its end ends nothing else.

What it says on standard error, its progress bars too, is passed on where this process writes to a terminal.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from coldstill.cache.processes import process_token
from coldstill.pipeline.runtime import program
from coldstill.pipeline.runtime.endings import USER_ERROR

_ERROR_PREFIX = "coldstill: "
_KEPT_LINES = 200
_READ_BYTES = 1 << 16
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        summary: What it printed with `--json`; None where it failed.
        error: Why it failed, in one line; None where it did not.
        is_refusal: Whether that is the user's to mend: exit code 2.
        last_lines: The last that it said on standard error.
    """

    summary: dict[str, Any] | None
    error: str | None
    is_refusal: bool
    last_lines: list[str]


def run_command(*arguments: str, on_start: Callable[[str], None]) -> Outcome:
    """Run a command to its end; where this process is interrupted meanwhile, it is ended too, as a person would.

    Args:
        arguments: Of `coldstill`; `--json` is added.
        on_start: Called with the process's token; see `coldstill.cache.processes`.
    """
    # Bars are as wide as the terminal that they are passed on to.
    environment = {**os.environ, "COLUMNS": str(shutil.get_terminal_size().columns)}
    with tempfile.TemporaryFile() as printed:
        child = subprocess.Popen(  # noqa: S603 - this program itself
            [sys.executable, *program.PROGRAM, *arguments, "--json"],
            stdout=printed,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            env=environment,
            process_group=0,  # an interruption at the terminal is this process's to pass on, once
        )
        assert child.stderr is not None
        with child.stderr:
            try:
                on_start(process_token(child.pid))
                lines = _follow(child.stderr)
                exit_code = child.wait()
            except BaseException:
                _end(child)
                raise
        if exit_code == 0:
            printed.seek(0)
            return Outcome(json.load(printed), None, False, lines)
        return Outcome(None, _error_line(exit_code, lines), exit_code == USER_ERROR, lines)


def _follow(stream: IO[bytes]) -> list[str]:
    """Read to the end, pass on to a terminal, and return the last lines as they were when they were left."""
    lines: deque[str] = deque(maxlen=_KEPT_LINES)
    rest = b""
    while piece := os.read(stream.fileno(), _READ_BYTES):
        if sys.stderr.isatty():
            sys.stderr.buffer.write(piece)
            sys.stderr.flush()
        *ended, rest = (rest + piece).split(b"\n")
        # A progress bar writes its line again and again.
        lines.extend(line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace") for line in ended)
        rest = rest.rpartition(b"\r")[2] if not rest.endswith(b"\r") else rest
    return [*lines, rest.decode(errors="replace")]


def _error_line(exit_code: int, lines: list[str]) -> str:
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        return f"killed by {name}" + (", as when memory runs out" if name == "SIGKILL" else "")
    said = [line.strip() for line in lines if line.strip()]
    named = [line.removeprefix(_ERROR_PREFIX) for line in said if line.startswith(_ERROR_PREFIX)]
    if exit_code == USER_ERROR and named:
        return named[-1]
    return said[-1] if said else f"exit code {exit_code}"


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a command so that it can tidy up; at once where it does not, or where that is interrupted too."""
    try:
        child.terminate()
        child.wait(_PATIENCE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        child.kill()
        with contextlib.suppress(KeyboardInterrupt):
            child.wait()
