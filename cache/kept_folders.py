"""Folders that are kept beside the stores, `<place>/<name>/`, with a checksum for each of their files.

What they hold, and which files of them count, is their owner's affair. `checksums.json` is written last: a folder
without it was never finished.
"""

import hashlib
import json
import shutil
from collections.abc import Collection
from pathlib import Path

from coldstill.cache.local_objects import LocalObjects
from coldstill.cache.objects import Objects
from coldstill.cache.tables import fetch

CHECKSUMS = "checksums.json"

_READ_AT_ONCE_BYTES = 8 << 20


def write_checksums(folder: Path, *, without: Collection[str] = ()) -> None:
    """Write the sha256 of every file of a local folder, but of those that are left out; with that it is complete."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.name not in without]
    objects = LocalObjects(str(folder))
    sums = {file.name: _sha256(objects, file.name) for file in files}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n")


def publish_folder(objects: Objects, name: str, folder: Path) -> None:
    """Copy a folder to where others find it, its checksums last; nothing happens where it is there."""
    if objects.exists(f"{name}/{CHECKSUMS}"):
        return
    for file in sorted(folder.iterdir(), key=lambda file: (file.name == CHECKSUMS, file.name)):
        with file.open("rb") as stream:
            objects.write_file(f"{name}/{file.name}", stream)


def fetch_folder(objects: Objects, name: str, folder: Path) -> str | None:
    """Copy the files of a kept folder into a local one, and say what is wrong with them; None where nothing is."""
    for file in objects.files(name):
        with fetch(objects, f"{name}/{file}") as source, (folder / file).open("wb") as copy:
            shutil.copyfileobj(source, copy)
    return find_damage(LocalObjects(str(folder.parent)), folder.name)


def find_damage(objects: Objects, folder: str) -> str | None:
    """Say what is wrong with a kept folder, None where all is as it was written."""
    try:
        sums: dict[str, str] = json.loads(objects.read(f"{folder}/{CHECKSUMS}"))
        for name, expected in sums.items():
            if _sha256(objects, f"{folder}/{name}") != expected:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (ValueError, AttributeError):
        return f"{CHECKSUMS} is not what was written"
    return None


def _sha256(objects: Objects, name: str) -> str:
    digest, num_bytes = hashlib.sha256(), 0
    while True:
        (part,) = objects.read_ranges([(name, num_bytes, _READ_AT_ONCE_BYTES)])
        digest.update(part)
        num_bytes += len(part)
        if len(part) < _READ_AT_ONCE_BYTES:
            return digest.hexdigest()
