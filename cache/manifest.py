"""Which (shard, column) pairs are complete, with checksums: the only truth about what a store holds.

A column of a shard exists when its commit record does. A fresh record is one JSON file; `compact` folds all records
into one Parquet file, so that opening a store costs the same at any size. Records are immutable and the union of all
files counts, so a reader that meets a compaction half-way sees each record at least once.
"""

import io
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cache.columns import Column
from cache.errors import CorruptError
from cache.identity import FINGERPRINT_CHARS, digest_of
from cache.store import Store

_FOLDER = "commits"
_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("column", pa.string()),
        ("spec", pa.string()),
        ("body", pa.string()),
        ("check", pa.string()),
    ]
)
_MAX_LISTINGS = 5


@dataclass(frozen=True)
class CommitRecord:
    """One complete column of one shard.

    Attributes:
        shard: The shard's name, or `cache.store.CONSTANTS`.
        column: What was written.
        num_tokens: Tokens of the shard.
        num_rows: Rows of the shard.
        objects: For each array the size in bytes and the sha256 of its object.
    """

    shard: str
    column: Column
    num_tokens: int
    num_rows: int
    objects: Mapping[str, Mapping[str, Any]]

    @property
    def stored_bytes(self) -> int:
        """Bytes on disk of the column's arrays."""
        return sum(entry["bytes"] for entry in self.objects.values())


class Manifest:
    """The committed columns of a store, as they were when it was loaded, and what this process adds."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lines: dict[str, dict[str, dict[str, str]]] = {}
        self._files: list[str] = []
        self._load()

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key[1] in self._lines.get(key[0], {})

    def columns(self, shard: str) -> list[str]:
        """Name the complete columns of a shard, sorted."""
        return sorted(self._lines.get(shard, {}))

    def record(self, shard: str, column: str) -> CommitRecord:
        """Give the commit record of a column that is complete.

        Raises:
            KeyError: It is not.
            CorruptError: The record is damaged.
        """
        line = self._lines[shard][column]
        if digest_of([line["shard"], line["column"], line["spec"], line["body"]]) != line["check"]:
            raise CorruptError(f"the commit record of column {column}, shard {shard}, in {self._store.path} is corrupt")
        body = json.loads(line["body"])
        return CommitRecord(shard=shard, column=Column.from_json(json.loads(line["spec"])), **body)

    def commit(self, record: CommitRecord) -> None:
        """Publish a record: from here on the column exists."""
        body = {"num_tokens": record.num_tokens, "num_rows": record.num_rows, "objects": record.objects}
        line = {
            "shard": record.shard,
            "column": record.column.name,
            "spec": json.dumps(record.column.to_json(), sort_keys=True),
            "body": json.dumps(body, sort_keys=True),
        }
        line["check"] = digest_of(list(line.values()))
        name = _record_name(record.shard, record.column.name)
        self._store.objects.write(name, json.dumps(line, indent=1).encode())
        self._add(line)
        self._files.append(name)

    def is_published(self, shard: str, column: str) -> bool:
        """Whether the column's own record lies in the store, whatever this manifest knows of it."""
        return self._store.objects.exists(_record_name(shard, column))

    def compact(self) -> None:
        """Fold all records into one file, then remove those it came from; nothing happens with fewer than two."""
        if len(self._files) < 2:
            return
        lines = [self._lines[shard][column] for shard in sorted(self._lines) for column in self.columns(shard)]
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(lines, schema=_SCHEMA), sink, compression="zstd")
        name = f"{_FOLDER}/{digest_of(lines)[:FINGERPRINT_CHARS]}.parquet"
        self._store.objects.write(name, sink.getvalue())
        for file in self._files:
            if file != name:
                self._store.objects.remove(file)
        self._files = [name]

    def _load(self) -> None:
        for _ in range(_MAX_LISTINGS):
            names = [f"{_FOLDER}/{name}" for name in self._store.objects.list(_FOLDER)]
            try:
                tables = [self._read(name) for name in names]
            except FileNotFoundError:
                continue  # a compaction removed it after the listing: list again
            self._files = names
            self._lines = {}
            for line in itertools.chain.from_iterable(tables):
                self._add(line)
            return
        raise CorruptError(f"the commit records of store {self._store.path} change faster than they can be read")

    def _add(self, line: dict[str, str]) -> None:
        self._lines.setdefault(line["shard"], {})[line["column"]] = line

    def _read(self, name: str) -> Iterable[dict[str, str]]:
        data = self._store.objects.read(name)
        try:
            if name.endswith(".json"):
                line = json.loads(data)
                return [{field: line[field] for field in _SCHEMA.names}]
            return list(pq.read_table(pa.BufferReader(data), schema=_SCHEMA).to_pylist())
        except (ValueError, KeyError, TypeError, pa.ArrowException, OSError) as error:
            raise CorruptError(
                f"{name} of store {self._store.path} is corrupt: {error}; delete the store and run precompute again"
            ) from None


def _record_name(shard: str, column: str) -> str:
    return f"{_FOLDER}/{shard}~{column.replace('/', '~')}.json"
