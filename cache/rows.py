"""Which rows a store knows, and which shard holds each.

Rows are laid into shards once, before anything is computed for them, and never move: a run that was cut off finds the
same shards again and so writes the same bytes. A row is known when its shard's tokens are committed.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coldstill.cache.errors import StoreNotFoundError
from coldstill.cache.identity import ROW_ID_BYTES, shard_id
from coldstill.cache.store import Store
from coldstill.cache.tables import fold, parse_table, read_folder, write_table

ROWS = "rows"
SHARD_TOKENS = 32_768

ROW_SCHEMA = pa.schema(
    [
        ("row", pa.binary(ROW_ID_BYTES)),
        ("shard", pa.dictionary(pa.int32(), pa.string())),
        ("position", pa.int32()),
        ("start", pa.int32()),
        ("length", pa.int32()),
    ]
)


def read_rows(store: Store, *, damaged: list[str] | None = None) -> pa.Table:
    """Return every row that was ever laid: row, shard, position, start, length; by shard and position, each once.

    Args:
        store: The store.
        damaged: Gains the names of damaged files, which are then left out; without it they are an error.

    Raises:
        CorruptError: A file of rows is damaged.
    """
    return sorted_rows(_read_files(store, damaged).values())


def lay_rows(known: pa.Table, shards: Collection[str], row_ids: Sequence[bytes], lengths: Sequence[int]) -> pa.Table:
    """Lay rows that the store does not know into shards; nothing is published yet.

    The caller commits the new shards' tokens and then calls `publish_rows`. A shard whose tokens were lost is laid
    again as it was, where all of its rows are asked for.

    Args:
        known: What `read_rows` gave.
        shards: The shards whose tokens are committed.
        row_ids: What `coldstill.cache.identity.row_id` gave, in the order of the run; a row may occur more than once.
        lengths: The number of tokens of each.

    Returns:
        A table with one line for each new row, shard after shard.
    """
    wanted = dict(zip(row_ids, lengths, strict=True))
    if wanted and min(wanted.values()) < 1:
        raise ValueError("a row needs at least one token")
    has_tokens = _has_tokens(known, shards)
    for row in _present(wanted, known.filter(has_tokens)):
        del wanted[row]
    restored = []
    for table in split_shards(known.filter(pc.invert(has_tokens))).values():
        members = table["row"].to_pylist()
        if all(row in wanted for row in members):
            restored.append(table)
            for row in members:
                del wanted[row]
    return pa.concat_tables([*restored, _lay_into_shards(wanted)])


def publish_rows(store: Store, laid: pa.Table) -> None:
    """Make new rows known to the store; nothing happens where there are none."""
    if len(laid):
        write_table(store.objects, ROWS, sorted_rows([laid]))


def compact_rows(store: Store) -> None:
    """Fold all files of rows into one; nothing happens where there is one."""
    files = _read_files(store, None)
    if len(files) > 1:
        fold(store.objects, ROWS, sorted_rows(files.values()), list(files))


def find_rows(store: Store, known: pa.Table, shards: Collection[str], row_ids: Sequence[bytes]) -> pa.Table:
    """Find the place of each of some rows: row, shard, position, start, length, one line for each.

    Raises:
        StoreNotFoundError: The store does not know one of them.
    """
    readable = known.filter(_has_tokens(known, shards))
    indices = pc.index_in(_ids(row_ids), value_set=readable["row"].combine_chunks())
    if indices.null_count:
        raise StoreNotFoundError(
            f"store {store.path} lacks {indices.null_count} of {len(row_ids)} rows; run: coldstill precompute"
        )
    return readable.take(indices)


def shard_rows(known: pa.Table, shards: Sequence[str]) -> dict[str, pa.Table]:
    """Return all rows of each shard, in their order on its token axis."""
    chosen = known.filter(pc.is_in(known["shard"].cast(pa.string()), pa.array(shards, pa.string())))
    tables = split_shards(chosen)
    return {shard: tables[shard] for shard in shards}


def split_shards(rows: pa.Table) -> dict[str, pa.Table]:
    """Split a table of rows in which each shard's lines lie together."""
    if not len(rows):
        return {}
    shards = rows["shard"].cast(pa.string()).combine_chunks().dictionary_encode()
    starts = [0, *(np.flatnonzero(np.diff(shards.indices.to_numpy())) + 1).tolist()]
    stops = [*starts[1:], len(rows)]
    parts = [rows.slice(start, stop - start) for start, stop in zip(starts, stops, strict=True)]
    return dict(zip(shards.dictionary.to_pylist(), parts, strict=True))


def rows_table(shard: str, row_ids: Sequence[bytes], lengths: Sequence[int]) -> pa.Table:
    """Return the lines of one shard's rows."""
    starts = np.cumsum([0, *lengths])[:-1]
    columns: dict[str, Any] = {
        "row": _ids(row_ids),
        "shard": pa.array([shard] * len(row_ids), pa.string()).dictionary_encode(),
        "position": np.arange(len(row_ids), dtype=np.int32),
        "start": starts.astype(np.int32),
        "length": np.array(lengths, np.int32),
    }
    return pa.table(columns, schema=ROW_SCHEMA)


def sorted_rows(tables: Iterable[pa.Table]) -> pa.Table:
    """Join tables of rows by shard and position, each line once: the same rows always make the same table."""
    joined = pa.concat_tables([ROW_SCHEMA.empty_table(), *tables])
    plain = joined.set_column(1, "shard", joined["shard"].cast(pa.string()))
    ordered = plain.sort_by([("shard", "ascending"), ("position", "ascending")]).combine_chunks()
    if len(ordered) > 1:
        shard, position = ordered["shard"].combine_chunks(), ordered["position"].combine_chunks()
        is_new = pc.or_(
            pc.not_equal(shard.slice(1), shard.slice(0, len(shard) - 1)),
            pc.not_equal(position.slice(1), position.slice(0, len(position) - 1)),
        )
        ordered = ordered.filter(pa.concat_arrays([pa.array([True]), is_new]))
    shards = ordered["shard"].combine_chunks().dictionary_encode()
    return ordered.set_column(1, ROW_SCHEMA.field("shard"), shards).combine_chunks()


def _lay_into_shards(new: Mapping[bytes, int]) -> pa.Table:
    """Fill shards greedily, in order, up to `SHARD_TOKENS`; a longer row has a shard of its own."""
    groups: list[list[bytes]] = []
    room = 0
    for row, length in new.items():
        if not groups or length > room:
            groups.append([])
            room = SHARD_TOKENS
        groups[-1].append(row)
        room -= length
    tables = [rows_table(shard_id(group), group, [new[row] for row in group]) for group in groups]
    return pa.concat_tables([ROW_SCHEMA.empty_table(), *tables])


def _read_files(store: Store, damaged: list[str] | None) -> dict[str, pa.Table]:
    def parse(name: str, data: bytes) -> pa.Table:
        return parse_table(name, data, ROW_SCHEMA)

    return read_folder(store.objects, ROWS, parse, damaged=damaged)


def _has_tokens(known: pa.Table, shards: Collection[str]) -> pa.Array:
    return pc.is_in(known["shard"].cast(pa.string()), value_set=pa.array(sorted(shards), pa.string()))


def _present(wanted: Collection[bytes], known: pa.Table) -> list[bytes]:
    if not len(wanted):
        return []
    requested = _ids(list(wanted))
    is_known = pc.is_in(requested, value_set=known["row"].combine_chunks())
    return list(requested.filter(is_known).to_pylist())


def _ids(row_ids: Sequence[bytes]) -> pa.Array:
    return pa.array(row_ids, pa.binary(ROW_ID_BYTES))
