"""The command line over shards of a test's length: it tells what it commits, waits for others, dies at a write.

Run in a process of its own, with what is wanted of it, as `wanted` writes it, before the command line's arguments.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def wanted(
    *, shard_tokens: int, commits: Path | None = None, kill_at: int | None = None, meets: tuple[Path, int] | None = None
) -> str:
    """Write what is wanted of a process.

    Args:
        shard_tokens: Tokens of a shard.
        commits: Where shard and column of each commit are listed: in a file of this name and the process's id.
        kill_at: The write to object storage at which it dies.
        meets: A folder, and how many processes it waits for there before it begins.
    """
    told = {"shard_tokens": shard_tokens, "commits": commits, "kill_at": kill_at, "meets": meets}
    return json.dumps(told, default=str)


def main() -> None:
    import coldstill.cache.laying
    import coldstill.cli

    told: dict[str, Any] = json.loads(sys.argv.pop(1))
    coldstill.cache.laying.SHARD_TOKENS = told["shard_tokens"]
    if told["commits"] is not None:
        _list_commits(told["commits"])
    if told["kill_at"] is not None:
        _die_at(told["kill_at"])
    _lose_no_time_over_failures()
    if told["meets"] is not None:
        _meet(Path(told["meets"][0]), told["meets"][1])
    coldstill.cli.main()


def _list_commits(name: str) -> None:
    from coldstill.cache.manifest import CommitRecord, Manifest

    commit = Manifest.commit

    def commit_and_tell(self: Manifest, record: CommitRecord) -> None:
        commit(self, record)
        with Path(f"{name}.{os.getpid()}").open("a") as file:
            print(record.shard, record.column.name, file=file)

    Manifest.commit = commit_and_tell


def _die_at(kill_at: int) -> None:
    from coldstill.cache.remote_objects import RemoteObjects

    write, num_writes = RemoteObjects.write, 0

    def write_or_die(self: RemoteObjects, name: str, data: bytes) -> None:
        nonlocal num_writes
        num_writes += 1
        if num_writes == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, name, data)

    RemoteObjects.write = write_or_die


def _lose_no_time_over_failures() -> None:
    import s3fs

    from coldstill.cache import remote_objects

    s3fs.S3FileSystem.retries = 1
    remote_objects.FIRST_PAUSE_S, remote_objects.LONGEST_PAUSE_S = 0.01, 0.05


def _meet(folder: Path, num_processes: int) -> None:
    (folder / f"ready.{os.getpid()}").touch()
    while len(list(folder.glob("ready.*"))) < num_processes:
        time.sleep(0.001)
