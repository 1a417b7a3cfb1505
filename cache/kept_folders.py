"""Folders that are kept beside the stores, `<place>/<name>/`, with a checksum for each of their files.

What they hold, and which files of them count, is their owner's affair. `checksums.json` is written last: a folder
without it was never finished.
"""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path

from coldstill.cache.local_objects import LocalObjects
from coldstill.cache.objects import Objects

CHECKSUMS = "checksums.json"

_READ_AT_ONCE_BYTES = 8 << 20


def write_checksums(folder: Path, *, without: Collection[str] = ()) -> None:
    """Write the sha256 of every file of a local folder, but of those that are left out; with that it is complete."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.name not in without]
    objects = LocalObjects(str(folder))
    sums = {file.name: _sha256(objects, file.name) for file in files}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n")


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
