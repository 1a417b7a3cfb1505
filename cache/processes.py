"""Which process wrote something, and whether it still lives.

What a process leaves half-made carries the token of that process, so that others can tell a writer at work from one
that was killed. Across machines nobody can tell from a token alone: the answer is then None.
"""

import contextlib
import functools
import hashlib
import os
import platform
from pathlib import Path

import psutil

_TOKEN_PARTS = 3
_ENDED_STATES = ("Z", "X")


def process_token(process_id: int | None = None) -> str:
    """Name a process, this one by default: machine, id and start, joined by `-`; letters, digits and `-` alone.

    Raises:
        psutil.NoSuchProcess: It has ended.
    """
    return _own_token(os.getpid()) if process_id is None else _token_of(process_id)


def is_dead(token: str) -> bool | None:
    """Say whether the process of a token has ended; None where it ran on another machine, or the token is none.

    A process that ended but was not waited for yet, a zombie, is dead.
    """
    parts = token.split("-")
    if len(parts) != _TOKEN_PARTS or parts[0] != _machine() or not (parts[1].isascii() and parts[1].isdigit()):
        return None
    try:
        return _token_of(int(parts[1])) != token
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


def describe_process(token: str) -> str:
    """Name a process as a person would."""
    parts = token.split("-")
    if len(parts) != _TOKEN_PARTS:
        return f"process {token}"
    return f"process {parts[1]}{'' if parts[0] == _machine() else ' on another machine'}"


@functools.lru_cache
def _own_token(process_id: int) -> str:
    """Remember this process's token; a fork has another id, and so another token."""
    return _token_of(process_id)


def _token_of(process_id: int) -> str:
    return f"{_machine()}-{process_id}-{_start(process_id)}"


def _start(process_id: int) -> int:
    """Return a number that tells a process from a later one with the same id, and does not change with the clock."""
    try:
        # The fields of proc(5) behind the command in brackets: the state is the first, the start the 20th.
        fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return round(psutil.Process(process_id).create_time())
    if fields[0] in _ENDED_STATES:
        raise psutil.NoSuchProcess(process_id)
    return int(fields[19])


@functools.cache
def _machine() -> str:
    """Identify what process ids are unique in: this boot of this machine, and this container on it."""
    facts = [platform.node()]
    with contextlib.suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        facts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:12]
