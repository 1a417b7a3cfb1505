"""The column that every shard begins with: its token ids and the lengths of its rows.

A shard describes itself: from this column alone follow its rows, their identities and its own name.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from coldstill.cache.columns import ArraySpec, Column
from coldstill.cache.identity import row_ids
from coldstill.cache.laying import LaidRows
from coldstill.cache.manifest import CommitRecord, Manifest
from coldstill.cache.row_lines import RowLines
from coldstill.cache.rows import rows_of_shard
from coldstill.cache.store import Store
from coldstill.cache.writer import write_column

TOKENS = "tokens"
LENGTHS = "lengths"

_UINT16_IDS = 1 << 16

TokensOf = Callable[[np.ndarray], Sequence[np.ndarray]]


def token_column(*, vocab_size: int) -> Column:
    """Describe the column for a teacher's vocabulary."""
    ids = ArraySpec("uint16" if vocab_size <= _UINT16_IDS else "uint32")
    return Column(TOKENS, {"ids": ids, LENGTHS: ArraySpec("int32", axis="row")}, {"vocab_size": vocab_size})


def write_tokens(store: Store, manifest: Manifest, laid: LaidRows, tokens: TokensOf, *, vocab_size: int) -> None:
    """Commit the token ids of newly laid shards: what the store knows of a row begins with the row itself.

    Args:
        store: The store.
        manifest: Its manifest.
        laid: What `coldstill.cache.laying.lay_rows` gave.
        tokens: Gives the token ids of some rows of the run by their indices, behind one another in pieces of any
            integer dtype.
        vocab_size: Entries of the teacher's vocabulary.
    """
    column = token_column(vocab_size=vocab_size)
    for shard, lines, indices in laid.shards():
        if (shard, TOKENS) in manifest:
            continue
        ids = np.concatenate(tokens(indices)).astype(column.arrays["ids"].dtype)
        lengths = np.ascontiguousarray(lines["length"])
        arrays = {"ids": ids, LENGTHS: lengths}
        write_column(store, manifest, shard, column, arrays, num_tokens=len(ids), num_rows=len(lengths))


def rows_of_tokens(record: CommitRecord, values: Mapping[str, np.ndarray]) -> RowLines:
    """Rebuild the lines of a shard's rows from its tokens."""
    lengths = values[LENGTHS]
    return rows_of_shard(record.shard, row_ids(values["ids"], lengths.tolist()), lengths)
