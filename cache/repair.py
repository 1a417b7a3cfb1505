"""Drop exactly what is wrong in a store, and mend what follows from the rest; the teacher is not needed for that.

What was dropped is not committed any more, so `precompute` writes it again.
"""

import contextlib
import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from coldstill.cache.arrays import read_column
from coldstill.cache.audit import Problem, StoreAudit, object_problem
from coldstill.cache.errors import InUseError
from coldstill.cache.identity import digest_of
from coldstill.cache.leases import LAYOUT, hold, living_writers
from coldstill.cache.manifest import CommitRecord, Manifest
from coldstill.cache.processes import describe_process
from coldstill.cache.row_lines import RowLines
from coldstill.cache.rows import ROWS, publish_rows, read_rows, split_shards
from coldstill.cache.store import (
    CONSTANTS,
    NAMESPACE,
    ROOT_METADATA,
    Store,
    group_metadata,
    missing_groups,
    parent_groups,
    root_metadata,
    shard_folder,
)
from coldstill.cache.tokens import TOKENS, rows_of_tokens
from coldstill.cache.writer import column_folder, column_metadata, object_path

_OWN_FILES = ("commits", "rows", "selection")


@dataclass(frozen=True)
class Mended:
    """What was done to a store.

    Attributes:
        dropped: The (shard, column) pairs that were taken back, to be computed again.
        rewritten: Files that follow from a record and were written again.
        adopted: Columns whose record was lost and that are committed again as they are.
        removed: Files that belong to nothing.
    """

    dropped: list[tuple[str, str]]
    rewritten: int
    adopted: int
    removed: int


def require_no_writer(store: Store, *, besides: str | None = None) -> None:
    """Refuse to change a store that somebody writes.

    Args:
        store: The store.
        besides: The file of a lease of one's own.

    Raises:
        InUseError: A writer lives.
    """
    for writer in living_writers(store.objects):
        if writer.file != besides:
            raise InUseError(f"store {store.path} is in use: {describe_process(writer.process)} writes it; wait for it")


@contextlib.contextmanager
def alone(store: Store) -> Iterator[None]:
    """Keep a store from being written by others.

    Raises:
        InUseError: A writer lives.
    """
    require_no_writer(store)
    # Who wants to write lays rows first, and waits for that.
    with hold(store.objects, [LAYOUT]) as lease:
        require_no_writer(store, besides=lease.file)
        yield


def mend_store(store: Store, audit: StoreAudit) -> Mended:
    """Mend what an audit of a store found.

    Raises:
        InUseError: Another process writes the store.
    """
    with alone(store):
        for problem in audit.problems:
            if problem.kind in _OWN_FILES and problem.file != ROWS:
                store.objects.remove(problem.file)
        manifest = Manifest(store)
        dropped = _drop(store, manifest, audit.problems)
        rewritten = _rewrite(store, manifest, audit.problems)
        adopted, removed = _adopt(store, manifest, audit.unfinished)
        _restore_rows(store, manifest, audit.problems)
    store.objects.sweep(is_alone=True)
    return Mended(dropped, rewritten, adopted, removed)


def drop_columns(store: Store, manifest: Manifest, keys: Collection[tuple[str, str]]) -> None:
    """Take back the records of some (shard, column) pairs, then remove their arrays and the groups left empty."""
    records = [manifest.record(*key) for key in keys]
    if not records:
        return
    manifest.drop(keys)
    for record in records:
        store.objects.remove_folder(column_folder(record))
    emptied = {folder for record in records for folder in parent_groups(record.shard, record.column.name)}
    for record in manifest.records():
        emptied.difference_update(parent_groups(record.shard, record.column.name))
    for folder in emptied - {shard_folder(CONSTANTS)}:
        store.objects.remove_folder(folder)


def _drop(store: Store, manifest: Manifest, problems: Iterable[Problem]) -> list[tuple[str, str]]:
    wrong = {(problem.shard or "", problem.column or "") for problem in problems if problem.kind == "array"}
    keys = sorted(key for key in wrong if key in manifest)
    drop_columns(store, manifest, keys)
    return keys


def _rewrite(store: Store, manifest: Manifest, problems: Iterable[Problem]) -> int:
    """Write again the Zarr metadata that follows from the records."""
    num_rewritten = 0
    records = list(manifest.records())
    needed = {folder for record in records for folder in parent_groups(record.shard, record.column.name)}
    for problem in problems:
        if problem.kind != "metadata":
            continue
        data = root_metadata(store.teacher) if problem.file == ROOT_METADATA else group_metadata()
        if problem.shard is not None and problem.column is not None:
            if (problem.shard, problem.column) in manifest:
                data = column_metadata(manifest.record(problem.shard, problem.column)).get(problem.file, data)
            elif problem.file.rsplit("/", 1)[0] not in needed:
                continue  # its column was dropped, and it is no group of another
        store.objects.write(problem.file, data)
        num_rewritten += 1
    return num_rewritten


def _adopt(store: Store, manifest: Manifest, unfinished: Collection[str]) -> tuple[int, int]:
    """Commit columns that are whole but have no record, and remove what is not."""
    adopted: set[str] = set()
    for name in unfinished:
        record = _lost_record(store, name) if name.endswith("/zarr.json") else None
        if record is not None and (record.shard, record.column.name) not in manifest:
            groups = missing_groups(store.objects, parent_groups(record.shard, record.column.name))
            store.objects.write_all(groups | column_metadata(record))
            manifest.commit(record)
            adopted.add(column_folder(record))
    kept = {folder for record in manifest.records() for folder in parent_groups(record.shard, record.column.name)}
    stray = [
        name for name in unfinished if name.rsplit("/", 1)[0] not in kept and adopted.isdisjoint(_folders_of(name))
    ]
    for name in stray:
        store.objects.remove(name)
    return len(adopted), len(stray)


def _folders_of(name: str) -> list[str]:
    """Name every folder that a file lies in."""
    parts = name.split("/")
    return ["/".join(parts[:length]) for length in range(1, len(parts))]


def _lost_record(store: Store, name: str) -> CommitRecord | None:
    """Return the record that a column's Zarr group carries, where all that it names is there."""
    try:
        line = dict(json.loads(store.objects.read(name))["attributes"][NAMESPACE])
        check = line.pop("check")
        if digest_of(line) != check:
            return None
        record = CommitRecord.from_line(line)
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        return None
    folder = column_folder(record)
    if name != f"{folder}/zarr.json":
        return None
    sizes = store.objects.sizes(folder)
    is_whole = all(
        object_problem(store, record, array, sizes.get(object_path(record, array))) is None
        for array in record.column.arrays
    )
    return record if is_whole else None


def _restore_rows(store: Store, manifest: Manifest, problems: Iterable[Problem]) -> None:
    """Let the rows that are known be those whose tokens are committed."""
    known = split_shards(read_rows(store))
    wrong = {problem.shard for problem in problems if problem.kind == "rows"}
    contradicted = wrong.intersection(manifest.shards(TOKENS))
    lost = [shard for shard in manifest.shards(TOKENS) if shard not in known or shard in contradicted]
    tables = []
    for shard in sorted(lost):
        record = manifest.record(shard, TOKENS)
        tables.append(rows_of_tokens(record, read_column(store, record)).table())
    if contradicted:
        store.objects.remove_folder(ROWS)
        tables += [table for shard, table in known.items() if shard not in contradicted]
    if tables:
        publish_rows(store, RowLines.of_tables(tables))
