"""Folders that are kept beside the stores, `<place>/<name>/`, with a checksum for each of their files.

What they hold, and which files of them count, is their owner's affair. `checksums.json` is written last: a folder
without it was never finished.
"""

import hashlib
import json
from pathlib import Path

from coldstill.cache.objects import Objects

CHECKSUMS = "checksums.json"


def find_damage(objects: Objects, folder: str) -> str | None:
    """Say what is wrong with a kept folder, None where all is as it was written."""
    try:
        sums: dict[str, str] = json.loads(objects.read(f"{folder}/{CHECKSUMS}"))
        for name, expected in sums.items():
            if hashlib.sha256(objects.read(f"{folder}/{name}")).hexdigest() != expected:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (ValueError, AttributeError):
        return f"{CHECKSUMS} is not what was written"
    return None
