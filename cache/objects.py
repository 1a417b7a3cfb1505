"""Named byte objects under one root: a local folder, or any fsspec URL such as s3://bucket/caches.

An object appears whole or not at all, and has reached the disk when `write` returns. Knows nothing of Zarr.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Protocol

from coldstill.cache.local_objects import LocalObjects
from coldstill.cache.remote_objects import RemoteObjects


class Objects(Protocol):
    """What a place that holds a store must do. Names are relative, with `/` between their parts."""

    root: str

    def read(self, name: str) -> bytes:
        """Return the whole object; FileNotFoundError where there is none."""

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Return parts of objects, each as (name, start, number of bytes); a part is shorter where its object ends.

        FileNotFoundError, with the name as its `filename`, where an object is missing.
        """

    def write(self, name: str, data: bytes) -> None:
        """Publish one object: durable, and never seen half-written."""

    def write_file(self, name: str, file: IO[bytes]) -> None:
        """Publish one object as `write` does, from where a file stands to its end."""

    def write_all(self, objects: Mapping[str, bytes]) -> None:
        """Publish several objects, in no order that can be relied on; all are durable when this returns."""

    def exists(self, name: str) -> bool:
        """Whether the object is there."""

    def files(self, folder: str) -> list[str]:
        """Names of the objects directly in a folder, sorted, without the folder; empty where it does not exist."""

    def folders(self, folder: str) -> list[str]:
        """Names of the folders directly in a folder, sorted, without it; empty where it does not exist."""

    def sizes(self, folder: str) -> dict[str, int]:
        """Map each object anywhere below a folder, named from the root, to its size in bytes."""

    def modified(self, name: str) -> datetime | None:
        """When the object was written last; None where there is none or the place does not say."""

    def free_bytes(self) -> int | None:
        """Room left for more; None where the place does not say."""

    def remove(self, name: str) -> None:
        """Remove one object; nothing happens where there is none."""

    def remove_folder(self, folder: str) -> None:
        """Remove all objects below a folder; nothing happens where there are none."""

    def sweep(self, *, is_alone: bool) -> int:
        """Remove what dead processes left half-written, and return how many there were.

        Args:
            is_alone: Whether no other process writes here, so that what came from another machine is stale too.
        """


def open_objects(root: str | Path) -> Objects:
    """Open a root without touching it."""
    text = str(root).removeprefix("file://")
    return RemoteObjects(text) if "://" in text else LocalObjects(text)


def full_path(root: str | Path) -> str:
    """Write a root so that it means the same from any folder: what an error says of where was looked."""
    text = str(root).removeprefix("file://")
    return text if "://" in text else str(Path(text).absolute())
