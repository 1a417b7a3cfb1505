"""The Zarr hierarchy of one teacher's store: where things are, open or create.

    stores/<fingerprint>/
        arrays.zarr/                                a Zarr v3 hierarchy that any Zarr reader opens
            zarr.json                               root group; the teacher's identity in its attributes
            shards/<shard>/<column>/<array>/        groups and arrays, written once
            constants/<column>/<array>/             what holds for the whole store, such as the output head
        rows/*.parquet                              which shard holds which row
        selections/<selection>.parquet              the rows of a run, in order
        commits/*                                   what is complete: see `cache.manifest`

A root (`caches/`) holds any number of stores, the index that leads from a recipe to its store, and pruned students.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cache.errors import FormatError, StoreNotFoundError
from cache.identity import fingerprint
from cache.objects import Objects, open_objects

FORMAT_VERSION = 1
CONSTANTS = "constants"

_HIERARCHY = "arrays.zarr"
_METADATA = "zarr.json"
_ROOT_METADATA = f"{_HIERARCHY}/{_METADATA}"
_NAMESPACE = "coldstill"


@dataclass(frozen=True)
class Store:
    """One teacher's store.

    Attributes:
        objects: Where its bytes lie; names are relative to the store's own folder.
        teacher: Facts about the teacher, among them its `identity`.
    """

    objects: Objects
    teacher: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The fingerprint of the store's teacher."""
        return fingerprint(self.teacher["identity"])

    @property
    def path(self) -> str:
        """The folder or URL of the store, as a person would name it."""
        return self.objects.root


def store_path(root: str, name: str) -> str:
    """Give the folder or URL of a store below its root."""
    return f"{root.rstrip('/')}/stores/{name}"


def create_store(root: str, teacher: Mapping[str, Any]) -> Store:
    """Open the store of a teacher, or create it.

    Args:
        root: A folder or an fsspec URL.
        teacher: JSON-able facts with at least `identity`, what `cache.identity.teacher_identity` gave.
    """
    path = store_path(root, fingerprint(teacher["identity"]))
    objects = open_objects(path)
    if objects.exists(_ROOT_METADATA):
        return open_store(path)
    for folder in ("shards", CONSTANTS):
        ensure_group(objects, f"{_HIERARCHY}/{folder}")
    # The root's metadata comes last: a store without it was never created.
    attributes = {_NAMESPACE: {"format": FORMAT_VERSION, "teacher": dict(teacher)}}
    objects.write(_ROOT_METADATA, _group_metadata(attributes))
    return Store(objects, teacher)


def open_store(path: str) -> Store:
    """Open a store that exists.

    Raises:
        StoreNotFoundError: There is none.
        FormatError: It was written by a version of the format that this version does not read.
    """
    objects = open_objects(path)
    try:
        attributes = json.loads(objects.read(_ROOT_METADATA))["attributes"][_NAMESPACE]
        version, teacher = attributes["format"], attributes["teacher"]
    except FileNotFoundError:
        raise StoreNotFoundError(f"no store at {path}; run: coldstill precompute") from None
    except (ValueError, KeyError, TypeError):
        raise FormatError(f"{path}/{_ROOT_METADATA} is not the metadata of a Coldstill store") from None
    if version != FORMAT_VERSION:
        raise FormatError(f"store {path} has format {version}, this version of Coldstill reads format {FORMAT_VERSION}")
    return Store(objects, teacher)


def shard_folder(shard: str) -> str:
    """Give the Zarr group of a shard, or of the store's constants."""
    return f"{_HIERARCHY}/{CONSTANTS}" if shard == CONSTANTS else f"{_HIERARCHY}/shards/{shard}"


def ensure_group(objects: Objects, folder: str, attributes: Mapping[str, Any] | None = None) -> None:
    """Make a folder a Zarr group, where it is none yet."""
    name = f"{folder}/{_METADATA}"
    if not objects.exists(name):
        objects.write(name, _group_metadata(attributes or {}))


def _group_metadata(attributes: Mapping[str, Any]) -> bytes:
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}, indent=1).encode()
