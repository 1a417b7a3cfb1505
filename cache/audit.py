"""Hold every byte of a store against what was committed.

What is wrong is a problem. What a killed writer leaves is not: it is noted, and the next `precompute` writes it again.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import pyarrow as pa

from coldstill.cache.arrays import read_column
from coldstill.cache.errors import CorruptError
from coldstill.cache.manifest import COMMITS, CommitRecord, Manifest, parse_record_name
from coldstill.cache.rows import ROWS, read_rows, split_shards
from coldstill.cache.selections import list_selections, read_selection, selection_file
from coldstill.cache.store import (
    CONSTANTS,
    HIERARCHY,
    ROOT_METADATA,
    Store,
    group_metadata,
    metadata_name,
    parent_groups,
    root_metadata,
)
from coldstill.cache.tables import SUFFIX
from coldstill.cache.tokens import TOKENS, rows_of_tokens
from coldstill.cache.writer import column_metadata, object_path

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was written.

    Attributes:
        kind: What sort of thing, which decides how it is mended: `store`, `commits`, `rows`, `selection`, `metadata`,
            `array`, `index`, or the kind of a folder that is kept beside the stores.
        file: Its name within the store, or within the root for an index entry or a kept folder.
        what: What is wrong with it, in words that name column and shard where it belongs to one.
        shard: The shard, for an array or its metadata.
        column: The column, likewise.
    """

    kind: str
    file: str
    what: str
    shard: str | None = None
    column: str | None = None


@dataclass
class StoreAudit:
    """What an audit of one store found.

    Attributes:
        path: The store's folder or URL.
        problems: What is wrong.
        unfinished: Files that no record names: writes that were cut off.
        unlisted: Shards whose tokens are committed, but whose rows were not made known yet.
        num_columns: Committed columns of shards that were read.
        num_bytes: Bytes that were read of them.
    """

    path: str
    problems: list[Problem] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)
    num_columns: int = 0
    num_bytes: int = 0


def audit_store(store: Store, *, on_bytes: OnBytes = lambda _: None) -> StoreAudit:
    """Read all of a store and hold it against its checksums.

    Args:
        store: The store.
        on_bytes: Told the number of bytes of each object once it was checked.
    """
    audit = StoreAudit(store.path)
    damaged_commits: list[str] = []
    manifest = Manifest(store, damaged=damaged_commits)
    audit.problems += [_commits_problem(name) for name in damaged_commits]
    sizes = store.objects.sizes(HIERARCHY)
    groups = {metadata_name(f"{HIERARCHY}/{folder}"): group_metadata() for folder in ("shards", CONSTANTS)}
    groups[ROOT_METADATA] = root_metadata(store.teacher)
    _check_metadata(store, audit, groups, None)
    expected = set(groups)
    for record in manifest.records():
        _check_column(store, audit, record, sizes, expected)
        audit.num_columns += 1
        audit.num_bytes += record.stored_bytes
        on_bytes(record.stored_bytes)
    audit.unfinished += sorted(sizes.keys() - expected)
    _check_rows(store, audit, manifest)
    for name in list_selections(store):
        try:
            read_selection(store, name)
        except CorruptError:
            audit.problems.append(Problem("selection", selection_file(name), "is not what was written"))
    return audit


def stored_bytes(store: Store) -> int:
    """Return the bytes that an audit of a store will read."""
    return sum(record.stored_bytes for record in Manifest(store, damaged=[]).records())


def object_problem(store: Store, record: CommitRecord, array: str, size: int | None) -> str | None:
    """Say what is wrong with the object of one array, None where it is as it was written."""
    if size is None:
        return "its object is missing"
    entry = record.objects[array]
    if size != entry["bytes"]:
        return f"its object has {size} bytes, expected {entry['bytes']}"
    if hashlib.sha256(store.objects.read(object_path(record, array))).hexdigest() != entry["sha256"]:
        return "its object is not what was written"
    return None


def _commits_problem(name: str) -> Problem:
    what = "the commit records in it are not what was written"
    if not name.endswith(SUFFIX):
        shard, column = parse_record_name(name)
        what = f"column {column}, shard {shard}: its commit record is not what was written"
    return Problem("commits", f"{COMMITS}/{name}", what)


def _check_column(
    store: Store, audit: StoreAudit, record: CommitRecord, sizes: dict[str, int], expected: set[str]
) -> None:
    """Check one committed column, and add the files that belong to it to those that are expected."""
    for array in record.column.arrays:
        path = object_path(record, array)
        expected.add(path)
        if what := object_problem(store, record, array, sizes.get(path)):
            place = f"column {record.column.name}, array {array}, shard {record.shard}: {what}"
            audit.problems.append(Problem("array", path, place, record.shard, record.column.name))
    groups = {metadata_name(folder): group_metadata() for folder in parent_groups(record.shard, record.column.name)}
    metadata = {name: data for name, data in (groups | column_metadata(record)).items() if name not in expected}
    _check_metadata(store, audit, metadata, record)
    expected.update(metadata)


def _check_metadata(store: Store, audit: StoreAudit, expected: dict[str, bytes], record: CommitRecord | None) -> None:
    for name, data in expected.items():
        try:
            what = None if store.objects.read(name) == data else "its Zarr metadata is not what was written"
        except FileNotFoundError:
            what = "its Zarr metadata is missing"
        if what:
            place = f"column {record.column.name}, shard {record.shard}: " if record else ""
            shard, column = (record.shard, record.column.name) if record else (None, None)
            audit.problems.append(Problem("metadata", name, f"{place}{what}", shard, column))


def _check_rows(store: Store, audit: StoreAudit, manifest: Manifest) -> None:
    """Hold the rows that are known against the tokens that they stand for."""
    damaged: list[str] = []
    known = read_rows(store, damaged=damaged)
    audit.problems += [Problem("rows", f"{ROWS}/{name}", "is not what was written") for name in damaged]
    of_shard = split_shards(known)
    broken = {problem.shard for problem in audit.problems if problem.kind == "array" and problem.column == TOKENS}
    for shard, table in of_shard.items():
        if (shard, TOKENS) not in manifest:
            what = f"column {TOKENS}, shard {shard}: {len(table)} rows are known, but their tokens are not committed"
            audit.problems.append(Problem("rows", ROWS, what, shard, TOKENS))
        elif shard not in broken:
            record = manifest.record(shard, TOKENS)
            if not _plain(rows_of_tokens(record, read_column(store, record)).table()).equals(_plain(table)):
                what = f"column {TOKENS}, shard {shard}: its tokens are not those of the rows that are known"
                audit.problems.append(Problem("rows", ROWS, what, shard, TOKENS))
    if not damaged:
        audit.unlisted = sorted(set(manifest.shards(TOKENS)) - of_shard.keys())


def _plain(table: pa.Table) -> pa.Table:
    return table.set_column(1, "shard", table["shard"].cast(pa.string())).combine_chunks()
