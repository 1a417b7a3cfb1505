"""Named byte objects under one root: a local folder, or any fsspec URL such as s3://bucket/caches.

An object appears whole or not at all, and has reached the disk when `write` returns. Knows nothing of Zarr.
"""

import os
import shutil
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

PARTIAL_SUFFIX = ".partial"


class Objects(Protocol):
    """What a place that holds a store must do. Names are relative, with `/` between their parts."""

    root: str

    def read(self, name: str) -> bytes:
        """Give the whole object; FileNotFoundError where there is none."""

    def read_range(self, name: str, start: int, num_bytes: int) -> bytes:
        """Give a part of the object, shorter where the object ends; a negative start counts from its end."""

    def write(self, name: str, data: bytes) -> None:
        """Publish the object: durable, and never seen half-written."""

    def exists(self, name: str) -> bool:
        """Whether the object is there."""

    def list(self, folder: str) -> list[str]:
        """Names of the objects directly in a folder, sorted, without the folder; empty where it does not exist."""

    def remove(self, name: str) -> None:
        """Remove one object; nothing happens where there is none."""

    def remove_folder(self, folder: str) -> None:
        """Remove all objects below a folder; nothing happens where there are none."""


def open_objects(root: str | Path) -> Objects:
    """Open a root without touching it."""
    text = str(root)
    return RemoteObjects(text) if "://" in text else LocalObjects(text)


class LocalObjects:
    """Objects as files below a local folder."""

    def __init__(self, root: str) -> None:
        self.root = str(Path(root).absolute())

    def read(self, name: str) -> bytes:
        return self._path(name).read_bytes()

    def read_range(self, name: str, start: int, num_bytes: int) -> bytes:
        with self._path(name).open("rb") as file:
            if start < 0:
                start += file.seek(0, os.SEEK_END)
            file.seek(max(start, 0))
            return file.read(num_bytes)

    def write(self, name: str, data: bytes) -> None:
        path = self._path(name)
        self._make_folder(path.parent)
        partial = path.with_name(f"{path.name}.{uuid4().hex}{PARTIAL_SUFFIX}")
        try:
            with partial.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        _sync_folder(path.parent)

    def exists(self, name: str) -> bool:
        return self._path(name).is_file()

    def list(self, folder: str) -> list[str]:
        try:
            entries = list(os.scandir(self._path(folder)))
        except FileNotFoundError:
            return []
        return sorted(entry.name for entry in entries if entry.is_file() and not entry.name.endswith(PARTIAL_SUFFIX))

    def remove(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def remove_folder(self, folder: str) -> None:
        path = self._path(folder)
        if path.exists():
            shutil.rmtree(path)

    def _path(self, name: str) -> Path:
        return Path(self.root, name)

    def _make_folder(self, folder: Path) -> None:
        if folder.is_dir():
            return
        self._make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        # A new folder is durable only when its parent has reached the disk.
        _sync_folder(folder.parent)


class RemoteObjects:
    """Objects below an fsspec URL, whose single writes are atomic, as they are on object storage."""

    def __init__(self, root: str) -> None:
        import fsspec

        self.root = root.rstrip("/")
        filesystem, path = fsspec.core.url_to_fs(self.root)
        self._filesystem: Any = filesystem
        self._base = path.rstrip("/")

    def read(self, name: str) -> bytes:
        return bytes(self._filesystem.cat_file(self._path(name)))

    def read_range(self, name: str, start: int, num_bytes: int) -> bytes:
        if start < 0:
            start = max(start + self._filesystem.size(self._path(name)), 0)
        return bytes(self._filesystem.cat_file(self._path(name), start=start, end=start + num_bytes))

    def write(self, name: str, data: bytes) -> None:
        self._filesystem.makedirs(self._path(name).rsplit("/", 1)[0], exist_ok=True)
        self._filesystem.pipe_file(self._path(name), data)

    def exists(self, name: str) -> bool:
        return bool(self._filesystem.isfile(self._path(name)))

    def list(self, folder: str) -> list[str]:
        self._filesystem.invalidate_cache()
        try:
            entries = self._filesystem.ls(self._path(folder), detail=True)
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rsplit("/", 1)[-1] for entry in entries if entry["type"] == "file")

    def remove(self, name: str) -> None:
        if self.exists(name):
            self._filesystem.rm_file(self._path(name))

    def remove_folder(self, folder: str) -> None:
        if self._filesystem.exists(self._path(folder)):
            self._filesystem.rm(self._path(folder), recursive=True)

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
