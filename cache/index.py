"""The index of a root: what leads from a recipe to the store and rows that `precompute` made for it.

`train` needs neither the teacher, the data nor the tokenizer, because this says where what they gave lies.
"""

import json
from collections.abc import Mapping
from typing import Any

from cache.errors import CorruptError, StoreNotFoundError
from cache.identity import FINGERPRINT_CHARS, digest_of
from cache.objects import open_objects

INDEX = "index"


def write_entry(root: str, kind: str, key: Any, value: Mapping[str, Any]) -> None:
    """Publish what a key leads to, in place of what it led to before.

    Args:
        root: The root of the stores.
        kind: What sort of entry, such as `rows` or `student`.
        key: JSON-able; the sections of the recipe that decide the value.
        value: JSON-able.
    """
    entry = {"key": key, "value": dict(value)}
    entry["check"] = digest_of(entry)
    open_objects(root).write(_entry_name(kind, key), json.dumps(entry, indent=1).encode())


def read_entry(root: str, kind: str, key: Any) -> dict[str, Any]:
    """Give what a key leads to.

    Raises:
        StoreNotFoundError: Nothing was published under it.
    """
    name = _entry_name(kind, key)
    try:
        return parse_entry(name.rsplit("/", 1)[-1], open_objects(root).read(name))
    except FileNotFoundError:
        raise StoreNotFoundError(
            f"{root} holds no {kind} for this recipe's teacher and data sections; run: coldstill precompute"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise CorruptError(f"{root}/{name} is corrupt; run: coldstill precompute") from None


def kept_entry(root: str, kind: str, key: Any) -> dict[str, Any] | None:
    """Give what a key leads to; None where nothing does, or what was written there is damaged and worth another try."""
    try:
        return read_entry(root, kind, key)
    except (StoreNotFoundError, CorruptError):
        return None


def parse_entry(name: str, data: bytes) -> dict[str, Any]:
    """Give the value of an entry's file, held against its check and its name.

    Raises:
        ValueError: It is not what was written; KeyError and TypeError mean the same.
    """
    entry = dict(json.loads(data))
    check = entry.pop("check")
    if digest_of(entry) != check or digest_of(entry["key"])[:FINGERPRINT_CHARS] not in name:
        raise ValueError("its content does not have the checksum that it names")
    return dict(entry["value"])


def _entry_name(kind: str, key: Any) -> str:
    return f"{INDEX}/{kind}-{digest_of(key)[:FINGERPRINT_CHARS]}.json"
