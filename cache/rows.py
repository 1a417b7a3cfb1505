"""Which rows a store knows: the files that say in which shard each of them lies.

Rows are laid into shards once (`coldstill.cache.laying`), before anything is computed for them, and never move: a run
that was cut off finds the same shards again and so writes the same bytes. A row is known when its shard's tokens are
committed.
"""

from collections.abc import Sequence
from typing import IO

import numpy as np
import pyarrow as pa

from coldstill.cache.row_lines import ROW_SCHEMA, RowLines, line_of_rows, sorted_lines
from coldstill.cache.store import Store
from coldstill.cache.tables import (
    GROUP_LINES,
    check_name,
    fold,
    open_parquet,
    read_folder,
    table_slices,
    write_tables,
)

ROWS = "rows"


def read_lines(store: Store, *, damaged: list[str] | None = None) -> dict[str, RowLines]:
    """Return the line of every row that was ever laid, by file; a line may be in several.

    Args:
        store: The store.
        damaged: Gains the names of damaged files, which are then left out; without it they are an error.

    Raises:
        CorruptError: A file of rows is damaged.
    """
    return read_folder(store.objects, ROWS, _parse, damaged=damaged)


def read_rows(store: Store, *, damaged: list[str] | None = None) -> pa.Table:
    """Return every row that was ever laid as a table in memory: row, shard, position, start, length; each once.

    It is ordered by shard and position; the arguments and errors are those of `read_lines`.
    """
    return sorted_lines(list(read_lines(store, damaged=damaged).values())).table()


def publish_rows(store: Store, rows: RowLines) -> None:
    """Make new rows known to the store; nothing happens where there are none."""
    if len(rows):
        write_tables(store.objects, ROWS, sorted_lines([rows]).tables(GROUP_LINES))


def compact_rows(store: Store) -> None:
    """Fold all files of rows into one; nothing happens where there is one."""
    if len(store.objects.files(ROWS)) > 1:
        files = read_lines(store)
        fold(store.objects, ROWS, sorted_lines(list(files.values())).tables(GROUP_LINES), list(files))


def split_shards(rows: pa.Table) -> dict[str, pa.Table]:
    """Split a table of rows in which each shard's lines lie together."""
    if not len(rows):
        return {}
    shards = rows["shard"].cast(pa.string()).combine_chunks().dictionary_encode()
    starts = [0, *(np.flatnonzero(np.diff(shards.indices.to_numpy())) + 1).tolist()]
    stops = [*starts[1:], len(rows)]
    parts = [rows.slice(start, stop - start) for start, stop in zip(starts, stops, strict=True)]
    return dict(zip(shards.dictionary.to_pylist(), parts, strict=True))


def rows_of_shard(shard: str, row_ids: np.ndarray, lengths: Sequence[int] | np.ndarray) -> RowLines:
    """Return the lines of one shard's rows, which lie behind one another in it."""
    rows = RowLines()
    if not len(row_ids):
        return rows
    rows.lines.append(line_of_rows(rows.number_of(shard), row_ids, np.asarray(lengths, np.int32)))
    return rows


def _parse(name: str, file: IO[bytes]) -> RowLines:
    check_name(name, file)
    with open_parquet(file, ROW_SCHEMA) as parquet:
        return RowLines.of_tables(table_slices(parquet))
