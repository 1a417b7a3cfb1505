"""Programs of this project in processes that are forked from one which has imported what they need.

Importing torch and transformers takes longer than most of what tests run, so it is done once for all of them.

`python tests/forked.py SOCKET MODULE ARGUMENTS...` stands for `python -m MODULE ARGUMENTS...`: a process is forked that
has its standard files, folder and environment, and calls the module's `main`. It ends as that one does, and passes on
SIGINT and SIGTERM. Signals that nobody hears, SIGKILL and SIGSTOP, are for `Forks.pid_behind`.
"""

import contextlib
import fcntl
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

PRELOADED = (
    "coldstill.cli",
    "coldstill.pipeline.ablate",
    "coldstill.pipeline.demo",
    "coldstill.pipeline.evaluate",
    "coldstill.pipeline.precompute",
    "coldstill.pipeline.repair",
    "coldstill.pipeline.train",
    "s3fs",
    "torch.distributed.run",
    "transformers.models.llama.modeling_llama",
)
PASSED_ON = (signal.SIGINT, signal.SIGTERM)
REAPING_S = 0.01
_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class Forks:
    """How to have processes forked.

    Attributes:
        socket: Where the server listens.
    """

    socket: Path

    def command(self, module: str, *arguments: Any) -> list[str]:
        """Name the program that stands for `python -m MODULE ARGUMENTS...`."""
        return [sys.executable, *self.program(module), *map(str, arguments)]

    def program(self, module: str) -> list[str]:
        """Name what Python runs in place of `-m MODULE`."""
        return ["-S", "-E", *self.script(module)]

    def script(self, module: str) -> list[str]:
        """Name a script, with its first arguments, that stands for a module."""
        return [__file__, str(self.socket), module]

    def pid_behind(self, process_id: int) -> int:
        """Name the process that was forked for one that `command` began."""
        with socket.socket(socket.AF_UNIX) as asking:
            asking.connect(str(self.socket))
            asking.sendall(json.dumps({"behind": process_id}).encode() + b"\n")
            return int(_line(asking))


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Forks]:
    """Start the server of a folder where there is none yet; it ends with the last of its users."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "socket"
    with socket.socket(socket.AF_UNIX) as lease:
        with (folder / "lock").open("w") as lock, (folder / "errors").open("a") as errors:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                lease.connect(str(path))
            except OSError:
                path.unlink(missing_ok=True)
                # This comes back as soon as the server that it leaves behind listens.
                environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
                command = [sys.executable, __file__, str(path)]
                subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
                lease.connect(str(path))
            lease.sendall(b'{"lease": true}\n')
        yield Forks(path)


def _stand_in(server: str, module: str, *arguments: str) -> NoReturn:
    """Have a process forked, pass signals on to it, and end as it does."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(server)
        told = {
            "stand_in": os.getpid(),
            "module": module,
            "arguments": arguments,
            "environment": dict(os.environ),
            "folder": str(Path.cwd()),
        }
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        socket.send_fds(asking, [json.dumps(told).encode() + b"\n"], [0, 1, 2])
        process_id = int(_line(asking))
        for number in PASSED_ON:
            signal.signal(number, lambda heard, _frame: os.kill(process_id, heard))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        exit_code = int(_line(asking))
    if exit_code < 0:
        with contextlib.suppress(OSError):  # nobody hears SIGKILL as it is
            signal.signal(-exit_code, signal.SIG_DFL)
        os.kill(os.getpid(), -exit_code)
    os._exit(exit_code)


def _line(connection: socket.socket) -> str:
    said = b""
    while not said.endswith(b"\n"):
        piece = connection.recv(64)
        if not piece:
            os._exit(70)
        said += piece
    return said.decode()


class Server:
    """Forks a process for each that asks, and says how it ended; ends when nobody holds a lease any more."""

    def __init__(self, path: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(64)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._leases: set[socket.socket] = set()
        self._working: dict[int, tuple[socket.socket, int]] = {}

    def serve(self) -> dict[str, Any] | None:
        """Serve until the last lease ends; in a forked process, give what that is to do."""
        has_begun = False
        while self._leases or not has_begun:
            for key, _ in self._selector.select(REAPING_S if self._working else None):
                if key.fileobj is self._listener:
                    connection = self._listener.accept()[0]
                    self._selector.register(connection, selectors.EVENT_READ)
                elif (told := self._hear(key.fileobj)) is not None:
                    return told
            has_begun = has_begun or bool(self._leases)
            self._reap()
        return None

    def _hear(self, connection: Any) -> dict[str, Any] | None:
        said, files = b"", []
        while not said.endswith(b"\n"):
            piece, received, _, _ = socket.recv_fds(connection, _LINE_BYTES, 3)
            if not piece:
                self._forget(connection)
                return None
            said += piece
            files += received
        told = json.loads(said)
        if "lease" in told:
            self._leases.add(connection)
        elif "behind" in told:
            behind = [pid for pid, (_, stand_in) in self._working.items() if stand_in == told["behind"]]
            connection.sendall(f"{behind[0] if behind else -1}\n".encode())
        else:
            process_id = os.fork()
            if process_id == 0:
                for number, file in enumerate(files):
                    os.dup2(file, number)
                    os.close(file)
                self._close()
                return told
            for file in files:
                os.close(file)
            self._working[process_id] = (connection, told["stand_in"])
            connection.sendall(f"{process_id}\n".encode())
        return None

    def _forget(self, connection: socket.socket) -> None:
        """Let go of one that went away, and end what was forked for it."""
        self._leases.discard(connection)
        for process_id, (working, _) in self._working.items():
            if working is connection:
                os.kill(process_id, signal.SIGKILL)
        self._selector.unregister(connection)
        connection.close()

    def _reap(self) -> None:
        for process_id in list(self._working):
            ended, status = os.waitpid(process_id, os.WNOHANG)
            if ended:
                connection, _ = self._working.pop(process_id)
                with contextlib.suppress(OSError):  # the one that asked may be gone
                    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())

    def _close(self) -> None:
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()
        self._selector.close()


def _serve(path: str) -> None:
    """Import what is needed, leave a server behind, and in the processes that it forks do what they are told."""
    import atexit
    import gc
    import importlib

    exit_codes: list[int] = []
    # What is registered first is called last. Behind it the interpreter would take its modules apart, which for so many
    # takes longer than most commands.
    atexit.register(lambda: _end(exit_codes))
    import torch

    from coldstill.pipeline.runtime import program

    for name in PRELOADED:
        importlib.import_module(name)
    with contextlib.suppress(ImportError):  # hundreds of regular expressions, made when a model is first loaded
        importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
    torch.set_num_threads(1)
    gc.freeze()  # a collection in a forked process would copy all of it
    server = Server(path)
    if os.fork():
        os._exit(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at a terminal it is for the tests
    told = server.serve()
    if told is None:
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(told["folder"])
    os.environ.clear()
    os.environ.update(told["environment"])
    sys.argv = [told["module"], *told["arguments"]]
    # What it begins in turn is forked too.
    program.PROGRAM = tuple(Forks(Path(path)).program("coldstill.cli"))
    try:
        importlib.import_module(told["module"]).main()
    except SystemExit as ended:
        exit_codes.append(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
    except BaseException:
        exit_codes.append(1)
        raise


def _end(exit_codes: list[int]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_codes[0] if exit_codes else 0)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        _stand_in(*sys.argv[1:])
    _serve(sys.argv[1])
