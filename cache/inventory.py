"""What lies in a root: its stores, and of each the columns, rows, selections and writers."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow.compute as pc

from coldstill.cache.errors import StoreNotFoundError
from coldstill.cache.index import INDEX, parse_entry
from coldstill.cache.leases import living_writers
from coldstill.cache.manifest import COMMITS, Manifest
from coldstill.cache.objects import full_path, open_objects
from coldstill.cache.processes import describe_process
from coldstill.cache.repair import alone, drop_columns, require_no_writer
from coldstill.cache.rows import ROWS, read_rows
from coldstill.cache.selections import list_selections, read_selection
from coldstill.cache.store import CONSTANTS, ROOT_METADATA, STORES, Store, open_store, store_path
from coldstill.cache.tokens import TOKENS


@dataclass(frozen=True)
class ColumnSummary:
    """A column over all shards of a store.

    Attributes:
        name: The column's name.
        num_shards: Shards that have it; 1 for what holds for the whole store.
        share: Of the store's shards, the share that has it.
        num_tokens: Tokens of these shards.
        num_bytes: Bytes of its arrays.
        bytes_per_token: Bytes a token, None for what is stored once.
    """

    name: str
    num_shards: int
    share: float
    num_tokens: int
    num_bytes: int
    bytes_per_token: float | None


@dataclass(frozen=True)
class SelectionSummary:
    """A selection: its name, its size, and where its rows came from."""

    name: str
    num_rows: int
    num_tokens: int
    source: dict[str, Any]


@dataclass(frozen=True)
class StoreSummary:
    """What one store holds.

    Attributes:
        name: The fingerprint of its teacher.
        path: Its folder or URL.
        teacher: Facts about its teacher.
        num_rows: Rows that it knows.
        num_tokens: Tokens of these.
        num_shards: Shards that hold them.
        num_bytes: Bytes of all columns.
        columns: Its columns, by name.
        selections: Its selections.
        writers: Processes that write it at the moment.
        age_s: Seconds since it was written last, None where nobody knows.
    """

    name: str
    path: str
    teacher: dict[str, Any]
    num_rows: int
    num_tokens: int
    num_shards: int
    num_bytes: int
    columns: list[ColumnSummary]
    selections: list[SelectionSummary]
    writers: list[str]
    age_s: float | None


def list_stores(root: str) -> list[str]:
    """Name the stores of a root.

    Raises:
        StoreNotFoundError: The root does not exist, or holds none.
    """
    names = open_objects(root).folders(STORES)
    if not names:
        raise StoreNotFoundError(f"no store in {full_path(root)}; a root is what a recipe names as `cache`")
    return names


def describe_store(root: str, name: str) -> StoreSummary:
    """Say what a store holds.

    Raises:
        CorruptError: Its records or rows are damaged.
    """
    store = open_store(store_path(root, name))
    manifest = Manifest(store)
    rows = read_rows(store)
    num_shards = len(manifest.shards(TOKENS))
    columns = [_describe_column(manifest, column, num_shards) for column in manifest.columns()]
    return StoreSummary(
        name=store.name,
        path=store.path,
        teacher=dict(store.teacher),
        num_rows=len(rows),
        num_tokens=int(pc.sum(rows["length"]).as_py() or 0),
        num_shards=num_shards,
        num_bytes=sum(column.num_bytes for column in columns),
        columns=columns,
        selections=[_describe_selection(store, selection) for selection in list_selections(store)],
        writers=[describe_process(writer.process) for writer in living_writers(store.objects)],
        age_s=_age_s(store),
    )


def remove_store(root: str, name: str) -> None:
    """Remove a store, even one that cannot be opened, and what leads to it in the index.

    Raises:
        InUseError: Somebody writes it.
    """
    objects = open_objects(root)
    require_no_writer(Store(open_objects(store_path(root, name)), {}))
    for file in objects.files(INDEX):
        try:
            leads_here = parse_entry(file, objects.read(f"{INDEX}/{file}")).get("store") == name
        except (ValueError, KeyError, TypeError):
            continue
        if leads_here:
            objects.remove(f"{INDEX}/{file}")
    # Its root metadata first: half removed, it is no store any more.
    objects.remove(f"{STORES}/{name}/{ROOT_METADATA}")
    objects.remove_folder(f"{STORES}/{name}")


def remove_column(store: Store, column: str) -> int:
    """Remove a column from all shards, and return the bytes that it took.

    Raises:
        StoreNotFoundError: No shard has it, or it is the tokens, without which nothing can be read.
        InUseError: Somebody writes the store.
    """
    manifest = Manifest(store)
    if column == TOKENS or column not in manifest.columns():
        removable = ", ".join(name for name in manifest.columns() if name != TOKENS)
        raise StoreNotFoundError(f"store {store.path} has no column {column} to remove; it has: {removable}")
    keys = [(shard, column) for shard in manifest.shards(column)]
    num_bytes = sum(manifest.record(*key).stored_bytes for key in keys)
    with alone(store):
        drop_columns(store, manifest, keys)
    return num_bytes


def _describe_column(manifest: Manifest, name: str, num_shards: int) -> ColumnSummary:
    shards = manifest.shards(name)
    records = [manifest.record(shard, name) for shard in shards]
    num_tokens = sum(record.num_tokens for record in records)
    num_bytes = sum(record.stored_bytes for record in records)
    return ColumnSummary(
        name=name,
        num_shards=len(shards),
        share=1.0 if CONSTANTS in shards else len(shards) / max(num_shards, 1),
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        bytes_per_token=num_bytes / num_tokens if num_tokens else None,
    )


def _describe_selection(store: Store, name: str) -> SelectionSummary:
    selection = read_selection(store, name)
    return SelectionSummary(name, len(selection), selection.num_tokens, dict(selection.provenance.get("source", {})))


def _age_s(store: Store) -> float | None:
    """Seconds since the newest file of records, rows or metadata was written."""
    objects = store.objects
    files = [ROOT_METADATA]
    for folder in (COMMITS, ROWS):
        files += [f"{folder}/{name}" for name in objects.files(folder)[:64]]
    times = [time for time in map(objects.modified, files) if time is not None]
    return max((datetime.now(UTC) - max(times)).total_seconds(), 0.0) if times else None


def choose_stores(root: str, beginning: str | None = None, *, just_one: bool = False) -> list[str]:
    """Name the stores of a root whose name begins so.

    Args:
        root: The root.
        beginning: Of the name; all stores where it is None.
        just_one: Whether more than one is an error.

    Raises:
        StoreNotFoundError: There is none, or more than the one that is wanted.
    """
    names = list_stores(root)
    chosen = [name for name in names if name.startswith(beginning or "")]
    if not chosen or (just_one and len(chosen) > 1):
        reason = (
            f"no store {beginning} in {full_path(root)}"
            if not chosen
            else f"{full_path(root)} has {len(chosen)} stores"
        )
        raise StoreNotFoundError(f"{reason}; name one with --store: {', '.join(names)}")
    return chosen
