"""The index of a root: what leads from a recipe to the store and rows that `precompute` made for it.

`train` needs neither the teacher, the data nor the tokenizer, because this says where what they gave lies.
"""

import json
from collections.abc import Mapping
from typing import Any

from cache.errors import CorruptError, StoreNotFoundError
from cache.identity import FINGERPRINT_CHARS, digest_of
from cache.objects import open_objects

_FOLDER = "index"


def write_entry(root: str, kind: str, key: Any, value: Mapping[str, Any]) -> None:
    """Publish what a key leads to, in place of what it led to before.

    Args:
        root: The root of the stores.
        kind: What sort of entry, such as `rows` or `student`.
        key: JSON-able; the sections of the recipe that decide the value.
        value: JSON-able.
    """
    entry = {"key": key, "value": dict(value)}
    open_objects(root).write(_entry_name(kind, key), json.dumps(entry, indent=1).encode())


def read_entry(root: str, kind: str, key: Any) -> dict[str, Any]:
    """Give what a key leads to.

    Raises:
        StoreNotFoundError: Nothing was published under it.
    """
    name = _entry_name(kind, key)
    try:
        return dict(json.loads(open_objects(root).read(name))["value"])
    except FileNotFoundError:
        raise StoreNotFoundError(
            f"{root} holds no {kind} for this recipe's teacher and data sections; run: coldstill precompute"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise CorruptError(f"{root}/{name} is corrupt; run: coldstill precompute") from None


def _entry_name(kind: str, key: Any) -> str:
    return f"{_FOLDER}/{kind}-{digest_of(key)[:FINGERPRINT_CHARS]}.json"
