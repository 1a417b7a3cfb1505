"""The column that every shard begins with: its token ids and the lengths of its rows.

A shard describes itself: from this column alone follow its rows, their identities and its own name.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from coldstill.cache.columns import ArraySpec, Column
from coldstill.cache.identity import row_id
from coldstill.cache.manifest import CommitRecord, Manifest
from coldstill.cache.rows import rows_table, split_shards
from coldstill.cache.store import Store
from coldstill.cache.writer import write_column

TOKENS = "tokens"
LENGTHS = "lengths"

_UINT16_IDS = 1 << 16


def token_column(*, vocab_size: int) -> Column:
    """Describe the column for a teacher's vocabulary."""
    ids = ArraySpec("uint16" if vocab_size <= _UINT16_IDS else "uint32")
    return Column(TOKENS, {"ids": ids, LENGTHS: ArraySpec("int32", axis="row")}, {"vocab_size": vocab_size})


def write_tokens(
    store: Store, manifest: Manifest, laid: pa.Table, tokens: Mapping[bytes, np.ndarray], *, vocab_size: int
) -> None:
    """Commit the token ids of newly laid shards: what the store knows of a row begins with the row itself.

    Args:
        store: The store.
        manifest: Its manifest.
        laid: What `coldstill.cache.rows.lay_rows` gave.
        tokens: The token ids of each row, [T] of any integer dtype, by `coldstill.cache.identity.row_id`.
        vocab_size: Entries of the teacher's vocabulary.
    """
    column = token_column(vocab_size=vocab_size)
    for shard, rows in split_shards(laid).items():
        if (shard, TOKENS) in manifest:
            continue
        ids = np.concatenate([tokens[row] for row in rows["row"].to_pylist()]).astype(column.arrays["ids"].dtype)
        lengths = rows["length"].combine_chunks().to_numpy()
        arrays = {"ids": ids, LENGTHS: lengths}
        write_column(store, manifest, shard, column, arrays, num_tokens=len(ids), num_rows=len(lengths))


def rows_of_tokens(record: CommitRecord, values: Mapping[str, np.ndarray]) -> pa.Table:
    """Rebuild the lines of a shard's rows from its tokens."""
    lengths = values[LENGTHS].tolist()
    rows = np.split(values["ids"], np.cumsum(lengths)[:-1])
    return rows_table(record.shard, [row_id(row) for row in rows], lengths)
