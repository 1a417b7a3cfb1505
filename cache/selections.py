"""The rows of one run and split, in order: what a reader reads by."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from coldstill.cache.array_object import REPAIR_HINT
from coldstill.cache.errors import CorruptError, StoreNotFoundError
from coldstill.cache.identity import FINGERPRINT_CHARS
from coldstill.cache.rows import ROW_SCHEMA
from coldstill.cache.store import Store
from coldstill.cache.tables import SUFFIX, parquet_bytes, parquet_table

SELECTIONS = "selections"

_PROVENANCE = b"provenance"
_SCHEMA = ROW_SCHEMA.append(pa.field("loss_start", pa.int32()))


@dataclass(frozen=True)
class Selection:
    """The rows of one run and split, in order; one array entry a row.

    Attributes:
        name: Its digest, which is its file's name.
        shard_names: Each shard once, in the order of its first row.
        shard_numbers: For each row the index of its shard in `shard_names`, int32.
        positions: The row's number within its shard.
        starts: Its first token's index on the shard's token axis.
        lengths: Its number of tokens.
        loss_starts: The first token that counts in a loss; those before it are a prompt.
        provenance: Where the rows came from: tokenizer, source, what was dropped.
    """

    name: str
    shard_names: Sequence[str]
    shard_numbers: np.ndarray
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


def make_selection(found: pa.Table, loss_starts: Sequence[int], provenance: Mapping[str, Any]) -> tuple[str, pa.Table]:
    """Name a selection of rows, as `coldstill.cache.rows.find_rows` found them, and lay its table; writes nothing."""
    shards = found["shard"].cast(pa.string()).combine_chunks().dictionary_encode()
    table = found.set_column(1, _SCHEMA.field("shard"), shards)
    table = table.append_column(_SCHEMA.field("loss_start"), pa.array(loss_starts, pa.int32())).combine_chunks()
    table = table.replace_schema_metadata({_PROVENANCE: json.dumps(dict(provenance), sort_keys=True)})
    return _digest(table), table


def write_selection(
    store: Store, found: pa.Table, loss_starts: Sequence[int], provenance: Mapping[str, Any]
) -> Selection:
    """Publish the rows of one run, as `coldstill.cache.rows.find_rows` found them, and give the selection."""
    name, table = make_selection(found, loss_starts, provenance)
    file = selection_file(name)
    if not store.objects.exists(file):
        store.objects.write(file, parquet_bytes(table))
    return to_selection(name, table)


def read_selection(store: Store, name: str) -> Selection:
    """Read a selection by name.

    Raises:
        StoreNotFoundError: The store has no such selection.
        CorruptError: Its file is damaged.
    """
    file = selection_file(name)
    try:
        return _parse(name, store.objects.read(file))
    except FileNotFoundError:
        raise StoreNotFoundError(f"store {store.path} has no {file}; run: coldstill precompute") from None
    except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise CorruptError(f"{file} of store {store.path} is corrupt: {error}; {REPAIR_HINT}") from None


def list_selections(store: Store) -> list[str]:
    """Name the selections of a store."""
    return [name.removesuffix(SUFFIX) for name in store.objects.files(SELECTIONS) if name.endswith(SUFFIX)]


def selection_file(name: str) -> str:
    """Name the file of a selection within its store."""
    return f"{SELECTIONS}/{name}{SUFFIX}"


def to_selection(name: str, table: pa.Table) -> Selection:
    """Read a selection's table."""
    shards = table["shard"].combine_chunks()
    column = {field: table[field].combine_chunks().to_numpy() for field in _SCHEMA.names[2:]}
    return Selection(
        name=name,
        shard_names=shards.dictionary.to_pylist(),
        shard_numbers=shards.indices.to_numpy(),
        positions=column["position"],
        starts=column["start"],
        lengths=column["length"],
        loss_starts=column["loss_start"],
        provenance=json.loads((table.schema.metadata or {}).get(_PROVENANCE, b"{}")),
    )


def _parse(name: str, data: bytes) -> Selection:
    table = parquet_table(data, _SCHEMA)
    if _digest(table) != name:
        raise ValueError("its content is not what it is named by")
    return to_selection(name, table)


def _digest(table: pa.Table) -> str:
    """Hash what the table says, column by column, so that the name does not depend on how Parquet wrote it."""
    hasher = hashlib.sha256(b"coldstill selection 2\0")
    hasher.update((table.schema.metadata or {}).get(_PROVENANCE, b""))
    shards = table["shard"].combine_chunks()
    hasher.update(b"\0" + "\n".join(shards.dictionary.to_pylist()).encode() + b"\0")
    hasher.update(np.ascontiguousarray(shards.indices.to_numpy(), "<i4").tobytes())
    rows = table["row"].combine_chunks()
    width = rows.type.byte_width
    hasher.update(rows.buffers()[1].slice(rows.offset * width, len(rows) * width))
    for name in _SCHEMA.names[2:]:
        hasher.update(b"\0" + name.encode() + b"\0")
        hasher.update(np.ascontiguousarray(table[name].combine_chunks().to_numpy(), "<i4").tobytes())
    return hasher.hexdigest()[:FINGERPRINT_CHARS]
