"""Byte objects as files below a local folder.

An object is written under `.partial/` and renamed into its place, so that what a killed process left is found in one
place whatever the size of the store.
"""

import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import IO
from uuid import uuid4

from coldstill.cache.processes import is_dead, process_token

PARTIAL_FOLDER = ".partial"

_CONCURRENT_SYNCS = 8


class LocalObjects:
    """Objects as files; see `coldstill.cache.objects.Objects`."""

    def __init__(self, root: str) -> None:
        self.root = str(Path(root).absolute())

    def read(self, name: str) -> bytes:
        return self._path(name).read_bytes()

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        parts: list[bytes] = []
        opened, descriptor = "", -1
        try:
            for name, start, num_bytes in ranges:
                if name != opened:
                    if descriptor >= 0:
                        os.close(descriptor)
                        descriptor = -1
                    descriptor, opened = os.open(f"{self.root}/{name}", os.O_RDONLY), name
                parts.append(os.pread(descriptor, num_bytes, start))
        except FileNotFoundError as error:
            error.filename = name
            raise
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        return parts

    def write(self, name: str, data: bytes) -> None:
        self.write_all({name: data})

    def write_file(self, name: str, file: IO[bytes]) -> None:
        self._write_all({name: lambda partial: shutil.copyfileobj(file, partial)})

    def write_all(self, objects: Mapping[str, bytes]) -> None:
        self._write_all({name: functools.partial(_write_bytes, data) for name, data in objects.items()})

    def _write_all(self, objects: Mapping[str, Callable[[IO[bytes]], object]]) -> None:
        partials: dict[Path, Path] = {}
        folder = self._path(PARTIAL_FOLDER)
        try:
            for name, write in objects.items():
                partial = folder / f"{process_token()}.{uuid4().hex}"
                partials[partial] = self._path(name)
                _write_new(partial, write)
            _sync(partials)
            # A folder's name first: after a write that fails here, the next one finds the folder and trusts it.
            _sync({parent for path in partials.values() for parent in _make_folder(path.parent)})
            for partial, path in partials.items():
                partial.replace(path)
        finally:
            for partial in partials:
                partial.unlink(missing_ok=True)
        # A name is durable only when its folder has reached the disk.
        _sync({path.parent for path in partials.values()})

    def exists(self, name: str) -> bool:
        return self._path(name).is_file()

    def size(self, name: str) -> int | None:
        """Return the object's size in bytes, None where there is none."""
        try:
            return self._path(name).stat().st_size
        except FileNotFoundError:
            return None

    def files(self, folder: str) -> list[str]:
        return sorted(entry.name for entry in self._scan(folder) if entry.is_file())

    def folders(self, folder: str) -> list[str]:
        return sorted(entry.name for entry in self._scan(folder) if entry.is_dir() and entry.name != PARTIAL_FOLDER)

    def sizes(self, folder: str) -> dict[str, int]:
        found: dict[str, int] = {}
        pending = [folder]
        while pending:
            current = pending.pop()
            for entry in self._scan(current):
                name = f"{current}/{entry.name}" if current else entry.name
                if entry.is_dir():
                    pending += [name] if entry.name != PARTIAL_FOLDER else []
                else:
                    found[name] = entry.stat().st_size
        return found

    def modified(self, name: str) -> datetime | None:
        try:
            return datetime.fromtimestamp(self._path(name).stat().st_mtime, UTC)
        except FileNotFoundError:
            return None

    def free_bytes(self) -> int | None:
        there = Path(self.root).absolute()
        while not there.exists():
            there = there.parent
        return shutil.disk_usage(there).free

    def remove(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def remove_folder(self, folder: str) -> None:
        path = self._path(folder)
        if path.exists():
            shutil.rmtree(path)

    def sweep(self, *, is_alone: bool) -> int:
        folder = self._path(PARTIAL_FOLDER)
        num_removed = 0
        for entry in self._scan(PARTIAL_FOLDER):
            dead = is_dead(entry.name.partition(".")[0])
            if dead or (dead is None and is_alone):
                Path(entry.path).unlink(missing_ok=True)
                num_removed += 1
        with contextlib.suppress(OSError):  # it is not there, or somebody writes again
            folder.rmdir()
        return num_removed

    def _path(self, name: str) -> Path:
        return Path(self.root, name)

    def _scan(self, folder: str) -> Iterable[os.DirEntry[str]]:
        try:
            with os.scandir(self._path(folder)) as entries:
                return list(entries)
        except FileNotFoundError:
            return []


def _write_bytes(data: bytes, file: IO[bytes]) -> None:
    file.write(data)


def _write_new(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    try:
        file = path.open("xb")
    except FileNotFoundError:
        _make_folder(path.parent)
        file = path.open("xb")
    with file:
        write(file)


def _make_folder(folder: Path) -> list[Path]:
    """Make a folder and those above it, and return the folders that gained one."""
    if folder.is_dir():
        return []
    changed = [*_make_folder(folder.parent), folder.parent]
    folder.mkdir(exist_ok=True)
    return changed


def _sync(paths: Collection[Path]) -> None:
    """Let files and folders reach the disk; side by side, as a file system commits them together."""
    if len(paths) < 2:
        for path in paths:
            sync_path(path)
        return
    with ThreadPoolExecutor(_CONCURRENT_SYNCS) as pool:
        list(pool.map(sync_path, paths))


def sync_path(path: Path) -> None:
    """Let one file or folder reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
