"""The Zarr hierarchy of one teacher's store: where things are, open or create.

    stores/<fingerprint>/
        arrays.zarr/                                a Zarr v3 hierarchy that any Zarr reader opens
            zarr.json                               root group; the teacher's identity in its attributes
            shards/<shard>/<column>/<array>/        groups and arrays, written once
            constants/<column>/<array>/             what holds for the whole store, such as the output head
        rows/*.parquet                              which shard holds which row
        selections/<selection>.parquet              the rows of a run, in order
        commits/*                                   what is complete: see `coldstill.cache.manifest`
        writers/*                                   who writes what at the moment: see `coldstill.cache.leases`

A root (`caches/`) holds any number of stores, the index that leads from a recipe to its store, and folders that
are kept beside the stores: see `coldstill.cache.kept_folders`.
The whole format is specified in docs/format.md.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coldstill.cache.array_object import REPAIR_HINT
from coldstill.cache.errors import CorruptError, FormatError, StoreNotFoundError
from coldstill.cache.identity import digest_of, fingerprint
from coldstill.cache.objects import Objects, full_path, open_objects

FORMAT_VERSION = 3
CONSTANTS = "constants"
HIERARCHY = "arrays.zarr"
NAMESPACE = "coldstill"
STORES = "stores"

_METADATA = "zarr.json"
_FORMAT_WITHOUT_CHECK = 1
ROOT_METADATA = f"{HIERARCHY}/{_METADATA}"


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
    """Return the folder or URL of a store below its root."""
    return f"{root.rstrip('/')}/{STORES}/{name}"


def create_store(root: str, teacher: Mapping[str, Any]) -> Store:
    """Open the store of a teacher, or create it.

    Args:
        root: A folder or an fsspec URL.
        teacher: JSON-able facts with at least `identity`, a map of words that says which teacher it is.
    """
    path = store_path(root, fingerprint(teacher["identity"]))
    objects = open_objects(path)
    if objects.exists(ROOT_METADATA):
        return open_store(path)
    objects.write_all(missing_groups(objects, [f"{HIERARCHY}/shards", f"{HIERARCHY}/{CONSTANTS}"]))
    # The root's metadata comes last: a store without it was never created.
    objects.write(ROOT_METADATA, root_metadata(teacher))
    return Store(objects, teacher)


def open_store(path: str) -> Store:
    """Open a store that exists.

    Raises:
        StoreNotFoundError: There is none.
        FormatError: It was written by a version of the format that this version does not read.
        CorruptError: What it says of its teacher is not what was written.
    """
    objects = open_objects(path)
    try:
        attributes = dict(json.loads(objects.read(ROOT_METADATA))["attributes"][NAMESPACE])
        version, teacher = attributes["format"], attributes["teacher"]
        is_whole = version == _FORMAT_WITHOUT_CHECK or attributes.pop("check") == digest_of(attributes)
        is_whole = is_whole and fingerprint(teacher["identity"]) == path.rsplit("/", 1)[-1]
    except FileNotFoundError:
        raise StoreNotFoundError(f"no store at {full_path(path)}; run: coldstill precompute") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise CorruptError(f"{path}/{ROOT_METADATA} is corrupt: it is not what was written; {REPAIR_HINT}")
    _check_version(path, version)
    return Store(objects, teacher)


def shard_folder(shard: str) -> str:
    """Return the Zarr group of a shard, or of the store's constants."""
    return f"{HIERARCHY}/{CONSTANTS}" if shard == CONSTANTS else f"{HIERARCHY}/shards/{shard}"


def metadata_name(folder: str) -> str:
    """Name the Zarr metadata of a group or array."""
    return f"{folder}/{_METADATA}"


def group_metadata(attributes: Mapping[str, Any] | None = None) -> bytes:
    """Return the `zarr.json` of a group."""
    metadata = {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes or {})}
    return json.dumps(metadata, indent=1, sort_keys=True).encode()


def root_metadata(teacher: Mapping[str, Any]) -> bytes:
    """Return the `zarr.json` of a store's root group."""
    facts = {"format": FORMAT_VERSION, "teacher": dict(teacher)}
    return group_metadata({NAMESPACE: {**facts, "check": digest_of(facts)}})


def parent_groups(shard: str, column: str) -> list[str]:
    """Name the folders from the shard's own down to the one above the column, which must all be Zarr groups."""
    folders = [shard_folder(shard)]
    for part in column.split("/")[:-1]:
        folders.append(f"{folders[-1]}/{part}")
    return folders


def missing_groups(objects: Objects, folders: list[str]) -> dict[str, bytes]:
    """Return the metadata, by name, of folders that are no Zarr groups yet."""
    missing = [folder for folder in folders if not objects.exists(metadata_name(folder))]
    return {metadata_name(folder): group_metadata() for folder in missing}


def _check_version(path: str, version: Any) -> None:
    if version == FORMAT_VERSION:
        return
    age = "an older" if version < FORMAT_VERSION else "a newer"
    advice = (
        "run precompute with another cache root, or remove it with coldstill cache rm and run precompute again"
        if version < FORMAT_VERSION
        else "install a newer Coldstill"
    )
    raise FormatError(
        f"store {path} has format {version}, {age} one than format {FORMAT_VERSION}, which this version of Coldstill "
        f"reads; {advice}"
    )
