"""Which rows a store knows, which shard holds each, and the selections of them that runs read.

Rows are laid into shards once, before anything is computed for them, and never move: a run that was cut off finds the
same shards again and so writes the same bytes.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cache.errors import CorruptError, StoreNotFoundError
from cache.identity import FINGERPRINT_CHARS, ROW_ID_BYTES, shard_id
from cache.store import Store

SHARD_TOKENS = 32_768

_PROVENANCE = b"provenance"

_ROW_SCHEMA = pa.schema(
    [
        ("row", pa.binary(ROW_ID_BYTES)),
        ("shard", pa.string()),
        ("position", pa.int32()),
        ("start", pa.int32()),
        ("length", pa.int32()),
    ]
)
_SELECTION_SCHEMA = _ROW_SCHEMA.append(pa.field("loss_start", pa.int32()))


@dataclass(frozen=True)
class Selection:
    """The rows of one run and split, in order; one array entry a row.

    Attributes:
        name: Its digest, which is its file's name.
        shards: The shard of each row.
        positions: The row's number within its shard.
        starts: Its first token's index on the shard's token axis.
        lengths: Its number of tokens.
        loss_starts: The first token that counts in a loss; those before it are a prompt.
        provenance: Where the rows came from: tokenizer, source, what was dropped.
    """

    name: str
    shards: np.ndarray
    positions: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    loss_starts: np.ndarray
    provenance: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows; a row that occurs twice counts twice."""
        return int(self.lengths.sum())

    def shard_names(self) -> list[str]:
        """Name each shard once, in the order of its first row."""
        return list(dict.fromkeys(self.shards.tolist()))


def lay_rows(store: Store, row_ids: Sequence[bytes], lengths: Sequence[int]) -> pa.Table:
    """Lay rows that the store has never seen into new shards; nothing is published yet.

    The caller commits the new shards' token ids and then calls `publish_rows`: every row that is known can be read.

    Args:
        store: The store.
        row_ids: What `cache.identity.row_id` gave, in the order of the run; a row may occur more than once.
        lengths: The number of tokens of each.

    Returns:
        A table with one line for each new row: row, shard, position, start, length; in the order of the shards.
    """
    requested = pa.array(row_ids, pa.binary(ROW_ID_BYTES))
    unknown = pc.index_in(requested, value_set=_known_rows(store)["row"].combine_chunks()).is_null().to_pylist()
    new = {row: length for row, length, is_new in zip(row_ids, lengths, unknown, strict=True) if is_new}
    return _lay_into_shards(new)


def publish_rows(store: Store, laid: pa.Table) -> None:
    """Make new rows known to the store; nothing happens where there are none."""
    if len(laid):
        _publish(store, "rows", laid)


def find_rows(store: Store, row_ids: Sequence[bytes]) -> pa.Table:
    """Find the place of each of some rows that the store knows: row, shard, position, start, length, one line for each.

    Raises:
        StoreNotFoundError: The store does not know one of them.
    """
    known = _known_rows(store)
    indices = pc.index_in(pa.array(row_ids, pa.binary(ROW_ID_BYTES)), value_set=known["row"].combine_chunks())
    if indices.null_count:
        raise StoreNotFoundError(
            f"store {store.path} lacks {indices.null_count} of {len(row_ids)} rows; run: coldstill precompute"
        )
    return known.take(indices)


def write_selection(
    store: Store, found: pa.Table, loss_starts: Sequence[int], provenance: Mapping[str, Any]
) -> Selection:
    """Publish the rows of one run, as `find_rows` found them, and give the selection."""
    table = found.append_column(_SELECTION_SCHEMA.field("loss_start"), pa.array(loss_starts, pa.int32()))
    table = table.replace_schema_metadata({_PROVENANCE: json.dumps(dict(provenance), sort_keys=True)})
    return read_selection(store, _publish(store, "selections", table))


def read_selection(store: Store, name: str) -> Selection:
    """Read a selection by name.

    Raises:
        StoreNotFoundError: The store has no such selection.
        CorruptError: Its file is damaged.
    """
    table = _read_table(store, f"selections/{name}.parquet", _SELECTION_SCHEMA)
    column = {field: table[field].combine_chunks().to_numpy(zero_copy_only=False) for field in table.column_names}
    return Selection(
        name=name,
        shards=column["shard"],
        positions=column["position"],
        starts=column["start"],
        lengths=column["length"],
        loss_starts=column["loss_start"],
        provenance=json.loads((table.schema.metadata or {}).get(_PROVENANCE, b"{}")),
    )


def shard_rows(store: Store, shards: Sequence[str]) -> dict[str, pa.Table]:
    """Give all rows of each shard, in their order on its token axis."""
    known = _known_rows(store)
    tables = {}
    for shard in shards:
        tables[shard] = known.filter(pc.equal(known["shard"], shard)).sort_by("position")
    return tables


def _lay_into_shards(new: Mapping[bytes, int]) -> pa.Table:
    """Fill shards greedily, in order, up to `SHARD_TOKENS`; a longer row has a shard of its own."""
    if new and min(new.values()) < 1:
        raise ValueError("a row needs at least one token")
    groups: list[list[bytes]] = []
    room = 0
    for row, length in new.items():
        if not groups or length > room:
            groups.append([])
            room = SHARD_TOKENS
        groups[-1].append(row)
        room -= length
    columns: dict[str, list[Any]] = {name: [] for name in _ROW_SCHEMA.names}
    for group in groups:
        shard, start = shard_id(group), 0
        for position, row in enumerate(group):
            for name, value in zip(columns, (row, shard, position, start, new[row]), strict=True):
                columns[name].append(value)
            start += new[row]
    return pa.table(columns, schema=_ROW_SCHEMA)


def _known_rows(store: Store) -> pa.Table:
    names = store.objects.list("rows")
    tables = [_read_table(store, f"rows/{name}", _ROW_SCHEMA) for name in names]
    return pa.concat_tables([_ROW_SCHEMA.empty_table(), *tables])


def _publish(store: Store, folder: str, table: pa.Table) -> str:
    name = _digest(table)
    if not store.objects.exists(f"{folder}/{name}.parquet"):
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        store.objects.write(f"{folder}/{name}.parquet", sink.getvalue())
    return name


def _read_table(store: Store, name: str, schema: pa.Schema) -> pa.Table:
    """Read a table that is named by its content, and hold it against its name."""
    try:
        # Not `io.BytesIO`: Arrow would call back into Python from a thread of its own, and a fork then can deadlock.
        table = pq.read_table(pa.BufferReader(store.objects.read(name)))
        is_whole = table.schema.names == schema.names and _digest(table) == PurePosixPath(name).stem
        reason = "its content is not what it is named by"
    except FileNotFoundError:
        raise StoreNotFoundError(f"store {store.path} has no {name}; run: coldstill precompute") from None
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        is_whole, reason = False, str(error)
    if not is_whole:
        raise CorruptError(
            f"{name} of store {store.path} is corrupt: {reason}; delete the store and run precompute again"
        )
    return table


def _digest(table: pa.Table) -> str:
    hasher = hashlib.sha256(b"coldstill rows 1\0")
    hasher.update((table.schema.metadata or {}).get(_PROVENANCE, b""))
    for name in table.column_names:
        values = table[name].combine_chunks()
        hasher.update(b"\0" + name.encode() + b"\0")
        if pa.types.is_integer(values.type):
            hasher.update(values.to_numpy().astype("<i4").tobytes())
        elif pa.types.is_string(values.type):
            hasher.update("\n".join(values.to_pylist()).encode())
        else:
            hasher.update(b"".join(values.to_pylist()))
    return hasher.hexdigest()[:FINGERPRINT_CHARS]
