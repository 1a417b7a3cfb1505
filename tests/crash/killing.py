"""Runs of the command line that are killed at a publish, at a removal, or at any moment.

This module's `main` is the process that runs are forked from: it has imported torch and transformers but has started
no thread of theirs, which a fork would lose.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from forked import Forks

SHARD_TOKENS = 96
CHILD_TIMEOUT_S = 120
FAILED = 70
KILLED = -signal.SIGKILL
PUBLISHES = ("replace", "rename")
REMOVALS = ("unlink", "remove", "rmdir")


@dataclass(frozen=True)
class Stop:
    """Where a run dies: before or after its nth call of some functions of `os`, on files of the recipe's folder."""

    functions: Sequence[str]
    number: int
    after: bool

    def __str__(self) -> str:
        return f"{'after' if self.after else 'before'} {self.functions[0]} {self.number}"


@dataclass(frozen=True)
class Run:
    """One command line to run in a child, and how it ends.

    Attributes:
        arguments: Of `coldstill`.
        folder: Where calls are counted.
        stop: Where it is killed; it comes to its end where this is None.
        kill_after_s: When it is killed, whatever it does then.
        verify: The root to verify before the command, which must be clean.
    """

    arguments: Sequence[str]
    folder: str
    stop: Stop | None = None
    kill_after_s: float | None = None
    verify: str | None = None


def main() -> None:
    """Read runs as lines of JSON, fork a child for each, and answer with its exit code and number of calls."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = Path(sys.argv[1])
    for line in sys.stdin:
        told = json.loads(line)
        run = Run(**told | {"stop": Stop(**told["stop"]) if told["stop"] else None})
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            _work(run, writing)
        os.close(writing)
        exit_code = _wait(child, run.kill_after_s)
        with os.fdopen(reading) as pipe:
            answer = {"exit_code": exit_code, **json.loads(pipe.read() or "{}")}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _work(run: Run, writing: int) -> None:
    """Do what a child does, and never return."""
    exit_code = FAILED
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123 - no file
            counts, exit_code = _run_command(run)
        os.write(writing, json.dumps(counts).encode())
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(exit_code)


def _run_command(run: Run) -> tuple[dict[str, int], int]:
    import coldstill.cache.laying
    from coldstill.cli import app
    from coldstill.pipeline.verify import verify

    os.fsync = lambda _descriptor: None  # a kill loses nothing that the kernel was given
    coldstill.cache.laying.SHARD_TOKENS = SHARD_TOKENS
    if run.verify:
        audit = verify(run.verify, show_progress=False)
        assert audit.is_clean, audit
    counts = {"publishes": 0, "removals": 0}
    for kind, functions in (("publishes", PUBLISHES), ("removals", REMOVALS)):
        stop = run.stop if run.stop and tuple(run.stop.functions) == functions else None
        for function in functions:
            setattr(os, function, _counting(getattr(os, function), run.folder, counts, kind, stop))
    try:
        app(list(run.arguments))
    except SystemExit as ended:
        return counts, int(ended.code or 0)
    return counts, FAILED


def _counting(
    function: Callable[..., Any], folder: str, counts: dict[str, int], kind: str, stop: Stop | None
) -> Callable[..., Any]:
    """Count calls that change a file below a folder, and die at the one where the run is to stop."""

    def counted(*arguments: Any, **options: Any) -> Any:
        path = os.fspath(arguments[-1 if kind == "publishes" else 0])
        if options.get("dir_fd") is not None:  # as `shutil.rmtree` names what it removes
            folder_of_fd = os.readlink(f"/proc/self/fd/{options['dir_fd']}")  # noqa: PTH115 - no file
            path = f"{folder_of_fd}/{path}"
        if not path.startswith(folder) or (kind == "removals" and not os.path.lexists(path)):
            return function(*arguments, **options)
        counts[kind] += 1
        is_here = stop is not None and counts[kind] == stop.number
        if is_here and not stop.after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **options)
        if is_here:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return counted


def _wait(child: int, kill_after_s: float | None) -> int:
    deadline = time.monotonic() + (CHILD_TIMEOUT_S if kill_after_s is None else kill_after_s)
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    exit_code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return FAILED if kill_after_s is None else exit_code


@dataclass
class Place:
    """A recipe in a folder of its own, run by children that a server forks."""

    folder: Path
    recipe: Path
    server: subprocess.Popen[str]

    @property
    def root(self) -> Path:
        return self.folder / "caches"

    def run(self, command: str = "precompute", **options: Any) -> dict[str, Any]:
        """Run a command in a child, and give its exit code and how often it published and removed."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        run = Run((command, str(self.recipe)), str(self.folder), **options)
        self.server.stdin.write(json.dumps(asdict(run)) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def complete(self, *, after: object) -> None:
        """Verify what a killed run left, then run to the end; `after` says in errors which kill it was."""
        has_store = any(self.root.glob("stores/*")) or any(self.root.glob("index/*"))
        ended = self.run(verify=str(self.root) if has_store else None)
        assert ended["exit_code"] == 0, f"after a kill {after}: {(self.folder / 'stderr').read_text()[-3000:]}"

    def clear(self) -> None:
        for name in ("caches", "run"):
            shutil.rmtree(self.folder / name, ignore_errors=True)


def all_stops(functions: Sequence[str], count: int) -> list[Stop]:
    return [Stop(functions, number, after) for number in range(1, count + 1) for after in (False, True)]


@contextlib.contextmanager
def serving(forks: Forks, folder: Path, recipe: Mapping[str, Any]) -> Iterator[Place]:
    """Give a place with a recipe, and the server that runs it."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(dict(recipe)))
    with (folder / "stderr").open("w") as stderr:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": stderr, "text": True}
        server = subprocess.Popen(forks.command("crash.killing", folder / "datasets"), **pipes)
    place = Place(folder, folder / "recipe.yaml", server)
    try:
        # The first run makes the copy of the text that `datasets` keeps, which no kill is to fall into.
        assert place.run()["exit_code"] == 0, (folder / "stderr").read_text()[-3000:]
        yield place
    finally:
        server.communicate(timeout=CHILD_TIMEOUT_S)
