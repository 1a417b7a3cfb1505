"""Write one column of one shard, then commit it."""

import hashlib
from collections.abc import Mapping

import numpy as np

from coldstill.cache.array_object import encode, object_name, zarr_metadata
from coldstill.cache.columns import ArraySpec, Column
from coldstill.cache.identity import digest_of
from coldstill.cache.manifest import CommitRecord, Manifest
from coldstill.cache.store import (
    NAMESPACE,
    Store,
    group_metadata,
    metadata_name,
    missing_groups,
    parent_groups,
    shard_folder,
)


def write_column(
    store: Store,
    manifest: Manifest,
    shard: str,
    column: Column,
    arrays: Mapping[str, np.ndarray],
    *,
    num_tokens: int,
    num_rows: int,
) -> CommitRecord:
    """Write a column's arrays durably and publish them by one commit record, last.

    Whatever an earlier, uncommitted attempt left is replaced. If this one fails, nothing of it stays.

    Args:
        store: The store.
        manifest: Its manifest, which gains the record.
        shard: The shard's name, or `coldstill.cache.store.CONSTANTS`.
        column: What to write.
        arrays: One for each array of the column, of its dtype and of its full shape in this shard.
        num_tokens: Tokens of the shard.
        num_rows: Rows of the shard.

    Raises:
        ValueError: An array is missing, its dtype or shape is not the column's, or the column is there already.
    """
    _check_arrays(column, arrays, num_tokens=num_tokens, num_rows=num_rows)
    _check_place(manifest, shard, column)
    encoded = {name: encode(arrays[name], spec) for name, spec in column.arrays.items()}
    sums = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in encoded.items()}
    record = CommitRecord(shard=shard, column=column, num_tokens=num_tokens, num_rows=num_rows, objects=sums)
    objects = {object_path(record, name): data for name, data in encoded.items()}
    try:
        groups = missing_groups(store.objects, parent_groups(shard, column.name))
        store.objects.write_all(groups | objects | column_metadata(record))
        manifest.commit(record)
    except BaseException:
        # The record may be out although publishing it raised, by a signal or a sync that failed: then the arrays stay.
        if not manifest.is_published(shard, column.name):
            store.objects.remove_folder(column_folder(record))
        raise
    return record


def column_folder(record: CommitRecord) -> str:
    """Name the Zarr group of a column in its shard."""
    return f"{shard_folder(record.shard)}/{record.column.name}"


def object_path(record: CommitRecord, array: str) -> str:
    """Name the object that holds the values of one array."""
    return f"{column_folder(record)}/{array}/{object_name(record.column.arrays[array])}"


def column_metadata(record: CommitRecord) -> dict[str, bytes]:
    """Return the Zarr metadata of a column's group and arrays, by name.

    The group carries the commit record as well, so that a column whose record was lost is found again.
    """
    folder = column_folder(record)
    line = record.to_line()
    attributes = {**record.column.attributes, NAMESPACE: {**line, "check": digest_of(line)}}
    metadata = {metadata_name(folder): group_metadata(attributes)}
    for name, spec in record.column.arrays.items():
        shape = spec.full_shape(num_tokens=record.num_tokens, num_rows=record.num_rows)
        metadata[metadata_name(f"{folder}/{name}")] = zarr_metadata(spec, shape)
    return metadata


def _check_place(manifest: Manifest, shard: str, column: Column) -> None:
    """Refuse to write over a committed column, or into the folder of one."""
    for committed in manifest.columns():
        if (shard, committed) in manifest and (
            f"{committed}/".startswith(f"{column.name}/") or f"{column.name}/".startswith(f"{committed}/")
        ):
            raise ValueError(f"column {column.name} cannot be written: shard {shard} has {committed} already")


def _check_arrays(column: Column, arrays: Mapping[str, np.ndarray], *, num_tokens: int, num_rows: int) -> None:
    if arrays.keys() != column.arrays.keys():
        raise ValueError(f"column {column.name} has arrays {sorted(column.arrays)}, got {sorted(arrays)}")
    for name, spec in column.arrays.items():
        _check_array(column, name, spec, arrays[name], spec.full_shape(num_tokens=num_tokens, num_rows=num_rows))


def _check_array(column: Column, name: str, spec: ArraySpec, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape or array.dtype != np.dtype(spec.dtype):
        raise ValueError(
            f"array {name} of column {column.name} must be {spec.dtype} of shape {shape}, "
            f"got {array.dtype} of {array.shape}"
        )
