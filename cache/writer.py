"""Write one column of one shard, then commit it."""

import hashlib
from collections.abc import Mapping

import numpy as np

from cache.array_object import encode, object_name, zarr_metadata
from cache.columns import ArraySpec, Column
from cache.manifest import CommitRecord, Manifest
from cache.store import Store, ensure_group, shard_folder


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
        shard: The shard's name, or `cache.store.CONSTANTS`.
        column: What to write.
        arrays: One for each array of the column, of its dtype and of its full shape in this shard.
        num_tokens: Tokens of the shard.
        num_rows: Rows of the shard.

    Raises:
        ValueError: An array is missing, its dtype or shape is not the column's, or the column is there already.
    """
    shapes = _checked_shapes(column, arrays, num_tokens=num_tokens, num_rows=num_rows)
    _check_place(manifest, shard, column)
    folder = f"{shard_folder(shard)}/{column.name}"
    store.objects.remove_folder(folder)
    try:
        _ensure_groups(store, shard, column)
        objects = {}
        for name, spec in column.arrays.items():
            data = encode(arrays[name], spec)
            store.objects.write(f"{folder}/{name}/{object_name(spec)}", data)
            store.objects.write(f"{folder}/{name}/zarr.json", zarr_metadata(spec, shapes[name]))
            objects[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        record = CommitRecord(shard=shard, column=column, num_tokens=num_tokens, num_rows=num_rows, objects=objects)
        manifest.commit(record)
    except BaseException:
        # The record may be out although publishing it raised, by a signal or a sync that failed: then the arrays stay.
        if not manifest.is_published(shard, column.name):
            store.objects.remove_folder(folder)
        raise
    return record


def _check_place(manifest: Manifest, shard: str, column: Column) -> None:
    """Refuse to write over a committed column, or into the folder of one."""
    for committed in manifest.columns(shard):
        if f"{committed}/".startswith(f"{column.name}/") or f"{column.name}/".startswith(f"{committed}/"):
            raise ValueError(f"column {column.name} cannot be written: shard {shard} has {committed} already")


def _checked_shapes(
    column: Column, arrays: Mapping[str, np.ndarray], *, num_tokens: int, num_rows: int
) -> dict[str, tuple[int, ...]]:
    if arrays.keys() != column.arrays.keys():
        raise ValueError(f"column {column.name} has arrays {sorted(column.arrays)}, got {sorted(arrays)}")
    shapes = {}
    for name, spec in column.arrays.items():
        shapes[name] = spec.full_shape(num_tokens=num_tokens, num_rows=num_rows)
        _check_array(column, name, spec, arrays[name], shapes[name])
    return shapes


def _check_array(column: Column, name: str, spec: ArraySpec, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape or array.dtype != np.dtype(spec.dtype):
        raise ValueError(
            f"array {name} of column {column.name} must be {spec.dtype} of shape {shape}, "
            f"got {array.dtype} of {array.shape}"
        )


def _ensure_groups(store: Store, shard: str, column: Column) -> None:
    """Make every folder on the way to the column a Zarr group, so that any Zarr reader finds it."""
    folder = shard_folder(shard)
    ensure_group(store.objects, folder)
    *parents, own = column.name.split("/")
    for part in parents:
        folder = f"{folder}/{part}"
        ensure_group(store.objects, folder)
    ensure_group(store.objects, f"{folder}/{own}", column.attributes)
