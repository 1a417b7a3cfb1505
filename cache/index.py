"""The index of a root: what leads from a recipe to the store and rows that `precompute` made for it.

`train` needs neither the teacher, the data nor the tokenizer, because this says where what they gave lies.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from coldstill.cache.errors import CorruptError, StoreNotFoundError
from coldstill.cache.identity import FINGERPRINT_CHARS, digest_of
from coldstill.cache.objects import full_path, open_objects

INDEX = "index"
# How many entries are looked through for the nearest one, and how many of its differences are said.
_MOST_READ = 200
_MOST_SAID = 3


def write_entry(root: str, kind: str, key: Any, value: Mapping[str, Any]) -> None:
    """Publish what a key leads to, in place of what it led to before.

    Args:
        root: The root of the stores.
        kind: What sort of entry, such as `rows`.
        key: JSON-able; the sections of the recipe that decide the value.
        value: JSON-able.
    """
    entry = {"key": key, "value": dict(value)}
    entry["check"] = digest_of(entry)
    open_objects(root).write(_entry_name(kind, key), json.dumps(entry, indent=1).encode())


def read_entry(root: str, kind: str, key: Any) -> dict[str, Any]:
    """Return what a key leads to.

    Raises:
        StoreNotFoundError: Nothing was published under it.
    """
    name = _entry_name(kind, key)
    try:
        return parse_entry(name.rsplit("/", 1)[-1], open_objects(root).read(name))
    except FileNotFoundError:
        *names, last = map(str, key)
        sections = f"{', '.join(names)} and {last}" if names else last
        raise StoreNotFoundError(
            f"{full_path(root)} holds no {kind} for this recipe's {sections} sections "
            f"({_what_is_there(root, kind, key)}); run: coldstill precompute"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise CorruptError(f"{root}/{name} is corrupt; run: coldstill precompute") from None


def kept_entry(root: str, kind: str, key: Any) -> dict[str, Any] | None:
    """Return what a key leads to; None where nothing does, or where it is damaged and worth another try."""
    name = _entry_name(kind, key)
    try:
        return parse_entry(name.rsplit("/", 1)[-1], open_objects(root).read(name))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _what_is_there(root: str, kind: str, key: Any) -> str:
    """Say what a root holds instead: the entry of that kind whose key differs least, and in what."""
    objects = open_objects(root)
    wanted = dict(_leaves(key))
    names = [name for name in objects.files(INDEX) if name.startswith(f"{kind}-")]
    nearest: list[str] | None = None
    for name in names[:_MOST_READ]:
        try:
            found = dict(_leaves(json.loads(objects.read(f"{INDEX}/{name}"))["key"]))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            continue
        different = [
            f"{leaf} {_shown(found, leaf)} there, {_shown(wanted, leaf)} here"
            for leaf in dict.fromkeys([*wanted, *found])
            if _shown(found, leaf) != _shown(wanted, leaf)
        ]
        if nearest is None or len(different) < len(nearest):
            nearest = different
    if nearest is None:
        return "nor any other" if objects.files(INDEX) or objects.folders("") else "nothing is there"
    more = f" and {len(nearest) - _MOST_SAID} more" if len(nearest) > _MOST_SAID else ""
    return f"the nearest there: {', '.join(nearest[:_MOST_SAID])}{more}"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested maps by dotted keys."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _leaves(item, f"{path}.{name}" if path else str(name))
    else:
        yield path, value


def _shown(leaves: Mapping[str, Any], leaf: str) -> str:
    return json.dumps(leaves[leaf]) if leaf in leaves else "not given"


def parse_entry(name: str, data: bytes) -> dict[str, Any]:
    """Return the value of an entry's file, held against its check and its name.

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
