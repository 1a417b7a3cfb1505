"""Rows into a store and out of it, as tests lay and find them: token ids in lists, places in tables."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from coldstill.cache.identity import row_id
from coldstill.cache.laying import LaidRows, WantedRows, lay_rows, places_of_rows, wanted_rows
from coldstill.cache.manifest import Manifest
from coldstill.cache.row_lines import RowLines
from coldstill.cache.rows import publish_rows, read_lines, read_rows, split_shards
from coldstill.cache.store import Store
from coldstill.cache.tokens import TOKENS, write_tokens


def ids_of(rows: Sequence[np.ndarray]) -> list[bytes]:
    return [row_id(row) for row in rows]


def wanted(rows: Sequence[np.ndarray]) -> WantedRows:
    return wanted_rows(ids_of(rows), [len(row) for row in rows])


def known(store: Store) -> list[RowLines]:
    return list(read_lines(store).values())


def laid_rows(store: Store, rows: Sequence[np.ndarray], manifest: Manifest | None = None) -> LaidRows:
    """Lay rows; nothing is written."""
    return lay_rows(known(store), (manifest or Manifest(store)).shards(TOKENS), wanted(rows))


def found_rows(store: Store, rows: Sequence[np.ndarray], manifest: Manifest | None = None) -> RowLines:
    """Find rows that are there."""
    return places_of_rows(store, known(store), (manifest or Manifest(store)).shards(TOKENS), wanted(rows))


def register(
    store: Store, rows: Sequence[np.ndarray], manifest: Manifest | None = None, *, vocab_size: int = 65_536
) -> RowLines:
    """Lay rows, commit their tokens, make them known, and find them."""
    manifest = manifest or Manifest(store)
    laid = laid_rows(store, rows, manifest)
    write_tokens(store, manifest, laid, lambda indices: [rows[index] for index in indices], vocab_size=vocab_size)
    publish_rows(store, laid.rows)
    return found_rows(store, rows, manifest)


def shard_rows(store: Store, shards: Sequence[str]) -> Mapping[str, pa.Table]:
    """Give all rows of some shards, in their order."""
    tables = split_shards(read_rows(store))
    return {shard: tables[shard] for shard in shards}
