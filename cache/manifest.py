"""Which (shard, column) pairs are complete, with checksums: the only truth about what a store holds.

A column of a shard exists when its commit record does. A fresh record is one JSON file; many of them are folded into
one Parquet file, so that opening a store costs little at any size. Records are immutable and the union of all files
counts.
"""

import functools
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc

from coldstill.cache.columns import Column
from coldstill.cache.identity import digest_of
from coldstill.cache.store import Store
from coldstill.cache.tables import SUFFIX, fold, parse_table, read_folder

COMMITS = "commits"

FOLD_EVERY = 1024
_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("column", pa.string()),
        ("spec", pa.dictionary(pa.int32(), pa.string())),
        ("num_tokens", pa.int64()),
        ("num_rows", pa.int64()),
        ("objects", pa.string()),
    ]
)

Line = dict[str, Any]


@dataclass(frozen=True)
class CommitRecord:
    """One complete column of one shard.

    Attributes:
        shard: The shard's name, or `coldstill.cache.store.CONSTANTS`.
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

    def to_line(self) -> Line:
        """Return the record as flat JSON-able data, as both kinds of file keep it."""
        return {
            "shard": self.shard,
            "column": self.column.name,
            "spec": json.dumps(self.column.to_json(), sort_keys=True),
            "num_tokens": self.num_tokens,
            "num_rows": self.num_rows,
            "objects": json.dumps(self.objects, sort_keys=True),
        }

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> "CommitRecord":
        """Rebuild a record from what `to_line` gave."""
        return cls(
            shard=line["shard"],
            column=_column(line["spec"]),
            num_tokens=line["num_tokens"],
            num_rows=line["num_rows"],
            objects=json.loads(line["objects"]),
        )


class Manifest:
    """The committed columns of a store, as they were when it was loaded, and what this process adds.

    Args:
        store: The store.
        columns: The columns to know of; all where it is None.
        damaged: Gains the names of damaged files, which are then left out; without it they are an error.

    Raises:
        CorruptError: A file of records is damaged.
    """

    def __init__(
        self, store: Store, *, columns: Collection[str] | None = None, damaged: list[str] | None = None
    ) -> None:
        self._store = store
        self._columns = None if columns is None else sorted(set(columns))
        self._damaged = damaged
        self.reload()

    def __contains__(self, key: tuple[str, str]) -> bool:
        shard, column = key
        return shard in self._places.get(column, {})

    def reload(self) -> None:
        """Read again what is committed, by other processes too."""
        parsed = read_folder(self._store.objects, COMMITS, _parse, damaged=self._damaged)
        self._folded = [name for name in parsed if name.endswith(SUFFIX)]
        self._loose = [name for name in parsed if not name.endswith(SUFFIX)]
        self._fresh: list[str] = []
        tables = [parsed[name] for name in self._folded]
        loose = [parsed[name] for name in self._loose]
        table = pa.concat_tables([_SCHEMA.empty_table(), *tables, pa.Table.from_pylist(loose, schema=_SCHEMA)])
        if self._columns is not None:
            table = table.filter(pc.is_in(table["column"], pa.array(self._columns, pa.string())))
        self._table = table.combine_chunks()
        self._places: dict[str, dict[str, int | CommitRecord]] = _places(self._table)

    def columns(self) -> list[str]:
        """Name every column that is complete in some shard, sorted."""
        return sorted(name for name, places in self._places.items() if places)

    def shards(self, column: str) -> Collection[str]:
        """Name the shards in which a column is complete."""
        return self._places.get(column, {}).keys()

    def record(self, shard: str, column: str) -> CommitRecord:
        """Return the commit record of a column that is complete.

        Raises:
            KeyError: It is not.
        """
        place = self._places[column][shard]
        if isinstance(place, CommitRecord):
            return place
        return CommitRecord.from_line({name: self._table[name][place].as_py() for name in _SCHEMA.names})

    def records(self) -> Iterator[CommitRecord]:
        """Yield every record, by shard and then by column."""
        keys = sorted((shard, column) for column, places in self._places.items() for shard in places)
        for shard, column in keys:
            yield self.record(shard, column)

    def bytes_per_token(self, column: str, *, shards: Collection[str] | None = None) -> float | None:
        """Return the bytes a token that a column takes in its shards, or in some of them; None where it is in none."""
        chosen = [shard for shard in self.shards(column) if shards is None or shard in shards]
        records = [self.record(shard, column) for shard in chosen]
        num_tokens = sum(record.num_tokens for record in records)
        return sum(record.stored_bytes for record in records) / num_tokens if num_tokens else None

    def commit(self, record: CommitRecord) -> None:
        """Publish a record: from here on the column exists."""
        name = record_name(record.shard, record.column.name)
        line = record.to_line()
        data = json.dumps({**line, "check": digest_of(line)}, indent=1).encode()
        self._store.objects.write(f"{COMMITS}/{name}", data)
        self._places.setdefault(record.column.name, {})[record.shard] = record
        self._fresh.append(name)
        if len(self._fresh) >= FOLD_EVERY:
            self._fold_fresh()

    def is_published(self, shard: str, column: str) -> bool:
        """Whether the column's record lies in the store, even where publishing it raised."""
        return (shard, column) in self or self._store.objects.exists(f"{COMMITS}/{record_name(shard, column)}")

    def compact(self) -> None:
        """Fold all records into one file, those of other processes too; nothing happens where there is one."""
        self._require_all_columns()
        self.reload()
        names = [*self._folded, *self._loose]
        if self._loose or len(names) > 1:
            self._folded = [fold(self._store.objects, COMMITS, [_sorted(self._table)], names)]
            self._loose = []

    def drop(self, keys: Collection[tuple[str, str]]) -> None:
        """Take back the records of some (shard, column) pairs: the rest is published first, in one file."""
        self._require_all_columns()
        kept = [record for record in self.records() if (record.shard, record.column.name) not in keys]
        names = [*self._folded, *self._loose, *self._fresh]
        lines = pa.Table.from_pylist([record.to_line() for record in kept], schema=_SCHEMA)
        fold(self._store.objects, COMMITS, [_sorted(lines)], names)
        self.reload()

    def _require_all_columns(self) -> None:
        if self._columns is not None:
            raise ValueError("a manifest of some columns cannot rewrite the records: it would lose those of the others")

    def _fold_fresh(self) -> None:
        """Fold this process's own loose records, so that neither a death nor a reader meets very many files."""
        lines = []
        for name in self._fresh:
            shard, column = parse_record_name(name)
            lines.append(self.record(shard, column).to_line())
        table = _sorted(pa.Table.from_pylist(lines, schema=_SCHEMA))
        self._folded.append(fold(self._store.objects, COMMITS, [table], self._fresh))
        self._fresh = []


@functools.lru_cache(maxsize=4096)
def _column(spec: str) -> Column:
    return Column.from_json(json.loads(spec))


def record_name(shard: str, column: str) -> str:
    """Name the file of one fresh record."""
    return f"{shard}~{column.replace('/', '~')}.json"


def parse_record_name(name: str) -> tuple[str, str]:
    """Return the shard and column of a fresh record's file."""
    shard, _, column = name.removesuffix(".json").partition("~")
    return shard, column.replace("~", "/")


def parse_line(data: bytes) -> Line:
    """Read one record of JSON and hold it against its check.

    Raises:
        ValueError: It is not what was written; KeyError and TypeError mean the same.
    """
    entry = json.loads(data)
    line = {name: entry[name] for name in _SCHEMA.names}
    if digest_of(line) != entry["check"]:
        raise ValueError("its content does not have the checksum that it names")
    return line


def _parse(name: str, file: IO[bytes]) -> pa.Table | Line:
    if name.endswith(SUFFIX):
        return parse_table(name, file, _SCHEMA)
    line = parse_line(file.read())
    if record_name(line["shard"], line["column"]) != name:
        raise ValueError("it is the record of another column or shard")
    return line


def _places(table: pa.Table) -> dict[str, dict[str, int | CommitRecord]]:
    """Map column -> shard -> line of the table."""
    columns = table["column"].combine_chunks().dictionary_encode()
    shards = table["shard"].combine_chunks()
    places: dict[str, dict[str, int | CommitRecord]] = {}
    for code, column in enumerate(columns.dictionary.to_pylist()):
        lines = pc.indices_nonzero(pc.equal(columns.indices, code))
        places[column] = dict(zip(shards.take(lines).to_pylist(), lines.to_pylist(), strict=True))
    return places


def _sorted(table: pa.Table) -> pa.Table:
    """Order the records by shard and column, each once: the same records always make the same file."""
    keys = table.append_column("line", pa.array(range(len(table)), pa.int64()))
    keys = keys.select(["shard", "column", "line"]).group_by(["shard", "column"]).aggregate([("line", "max")])
    keys = keys.sort_by([("shard", "ascending"), ("column", "ascending")])
    ordered = table.take(keys["line_max"].combine_chunks())
    # A dictionary in the order of the lines: built anew, not as the files happened to be joined.
    spec = ordered["spec"].cast(pa.string()).combine_chunks().dictionary_encode()
    return ordered.set_column(ordered.schema.get_field_index("spec"), _SCHEMA.field("spec"), spec).combine_chunks()
