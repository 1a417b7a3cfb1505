"""The rows of one run and split, in order: what a reader reads by, and what the run says of each row.

A table has one of two forms, and what it says decides which: where rows have nothing but prompts of weight 0, it is the
table that every version of format 3 wrote, so that the same rows keep their selection. Other spans, and labels of rows,
have columns of their own.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from coldstill.cache.array_object import REPAIR_HINT
from coldstill.cache.errors import CorruptError, FormatError, StoreNotFoundError
from coldstill.cache.identity import FINGERPRINT_CHARS
from coldstill.cache.rows import ROW_SCHEMA
from coldstill.cache.spans import RowSpans, Span, check_spans
from coldstill.cache.store import Store
from coldstill.cache.tables import SUFFIX, parquet_bytes, parquet_names, parquet_table

SELECTIONS = "selections"

_PROVENANCE = b"provenance"
_SPAN = pa.struct([("start", pa.int32()), ("stop", pa.int32()), ("weight", pa.float32())])
_PROMPTS = ROW_SCHEMA.append(pa.field("loss_start", pa.int32()))
_SPANS = ROW_SCHEMA.append(pa.field("spans", pa.list_(_SPAN))).append(pa.field("labels", pa.list_(pa.float32())))


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
        spans: What its tokens weigh in a loss.
        labels: Its own labels, as many for every row, float32 [rows, labels]; none mostly.
        provenance: Where the rows came from: tokenizer, source, what was dropped.
    """

    name: str
    shard_names: Sequence[str]
    shard_numbers: np.ndarray
    positions: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    spans: RowSpans
    labels: np.ndarray
    provenance: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows; a row that occurs twice counts twice."""
        return int(self.lengths.sum())


def make_selection(
    found: pa.Table,
    spans: Sequence[Sequence[Span]],
    provenance: Mapping[str, Any],
    labels: Sequence[Sequence[float]] = (),
) -> tuple[str, pa.Table]:
    """Name a selection of rows, and lay its table; writes nothing.

    Args:
        found: The rows, as `coldstill.cache.rows.find_rows` found them.
        spans: Of each row; none where all of its tokens weigh the same.
        provenance: Where the rows came from, as JSON takes it.
        labels: Of each row, as many for every row; none for rows without labels.

    Raises:
        ValueError: There are not as many spans or labels as rows, or one is not what it must be.
    """
    for of_row, length in zip(spans, found["length"].to_pylist(), strict=True):
        check_spans(of_row, length)
    laid = RowSpans.of_rows(spans)
    shards = found["shard"].cast(pa.string()).combine_chunks().dictionary_encode()
    table = found.set_column(1, ROW_SCHEMA.field("shard"), shards)
    of_rows = _label_array(labels, len(found))
    prompts = laid.prompt_lengths()
    if prompts is not None and not of_rows.shape[1]:
        table = table.append_column(_PROMPTS.field("loss_start"), pa.array(prompts))
    else:
        table = table.append_column(_SPANS.field("spans"), _span_lists(laid))
        table = table.append_column(_SPANS.field("labels"), pa.array(list(of_rows), _SPANS.field("labels").type))
    table = table.combine_chunks().replace_schema_metadata({_PROVENANCE: json.dumps(dict(provenance), sort_keys=True)})
    return _digest(table), table


def write_selection(
    store: Store,
    found: pa.Table,
    spans: Sequence[Sequence[Span]],
    provenance: Mapping[str, Any],
    labels: Sequence[Sequence[float]] = (),
) -> Selection:
    """Publish the rows of one run, and return the selection; takes what `make_selection` takes."""
    name, table = make_selection(found, spans, provenance, labels)
    file = selection_file(name)
    if not store.objects.exists(file):
        store.objects.write(file, parquet_bytes(table))
    return to_selection(name, table)


def read_selection(store: Store, name: str) -> Selection:
    """Read a selection by name.

    Raises:
        StoreNotFoundError: The store has no such selection.
        CorruptError: Its file is damaged.
        FormatError: It says something of rows that this version does not know.
    """
    file = selection_file(name)
    try:
        data = store.objects.read(file)
        unknown = _unknown_columns(data)
        if not unknown:
            return _parse(name, data)
    except FileNotFoundError:
        raise StoreNotFoundError(f"store {store.path} has no {file}; run: coldstill precompute") from None
    except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise CorruptError(f"{file} of store {store.path} is corrupt: {error}; {REPAIR_HINT}") from None
    raise FormatError(
        f"{file} of store {store.path} says more of its rows than this version of Coldstill knows: "
        f"{', '.join(unknown)}; install a newer Coldstill, or run: coldstill precompute"
    )


def list_selections(store: Store) -> list[str]:
    """Name the selections of a store."""
    return [name.removesuffix(SUFFIX) for name in store.objects.files(SELECTIONS) if name.endswith(SUFFIX)]


def selection_file(name: str) -> str:
    """Name the file of a selection within its store."""
    return f"{SELECTIONS}/{name}{SUFFIX}"


def to_selection(name: str, table: pa.Table) -> Selection:
    """Read a selection's table."""
    shards = table["shard"].combine_chunks()
    column = {field: table[field].combine_chunks() for field in table.schema.names[2:]}
    return Selection(
        name=name,
        shard_names=shards.dictionary.to_pylist(),
        shard_numbers=shards.indices.to_numpy(),
        positions=column["position"].to_numpy(),
        starts=column["start"].to_numpy(),
        lengths=column["length"].to_numpy(),
        spans=_spans_of(column),
        labels=_labels_of(column, len(table)),
        provenance=json.loads((table.schema.metadata or {}).get(_PROVENANCE, b"{}")),
    )


def _unknown_columns(data: bytes) -> list[str]:
    """Name the columns of a selection that a later version wrote; none where it is no selection at all."""
    names = parquet_names(data)
    is_selection = set(ROW_SCHEMA.names).issubset(names) and not {"loss_start", "spans"}.isdisjoint(names)
    return [name for name in names if name not in {*_PROMPTS.names, *_SPANS.names}] if is_selection else []


def _parse(name: str, data: bytes) -> Selection:
    table = parquet_table(data, _SPANS if "spans" in parquet_names(data) else _PROMPTS)
    if _digest(table) != name:
        raise ValueError("its content is not what it is named by")
    return to_selection(name, table)


def _digest(table: pa.Table) -> str:
    """Hash what the table says, column by column, so that the name does not depend on how Parquet wrote it."""
    has_spans = "spans" in table.schema.names
    hasher = hashlib.sha256(b"coldstill selection 3\0" if has_spans else b"coldstill selection 2\0")
    hasher.update((table.schema.metadata or {}).get(_PROVENANCE, b""))
    shards = table["shard"].combine_chunks()
    hasher.update(b"\0" + "\n".join(shards.dictionary.to_pylist()).encode() + b"\0")
    hasher.update(np.ascontiguousarray(shards.indices.to_numpy(), "<i4").tobytes())
    rows = table["row"].combine_chunks()
    width = rows.type.byte_width
    hasher.update(rows.buffers()[1].slice(rows.offset * width, len(rows) * width))
    for name in table.schema.names[2:]:
        hasher.update(b"\0" + name.encode() + b"\0")
        for values in _plain_arrays(table[name].combine_chunks()):
            little_endian = "<f4" if values.dtype == np.float32 else "<i4"
            hasher.update(np.ascontiguousarray(values, little_endian).tobytes())
    return hasher.hexdigest()[:FINGERPRINT_CHARS]


def _plain_arrays(column: pa.Array) -> list[np.ndarray]:
    """Take a column apart: a list into the lengths of its lists and what they hold, a struct into its fields."""
    if pa.types.is_list(column.type):
        return [column.value_lengths().to_numpy(), *_plain_arrays(column.flatten())]
    if pa.types.is_struct(column.type):
        return [column.field(index).to_numpy() for index in range(column.type.num_fields)]
    return [column.to_numpy()]


def _spans_of(column: Mapping[str, pa.Array]) -> RowSpans:
    if "loss_start" in column:
        return RowSpans.of_prompts(column["loss_start"].to_numpy())
    return RowSpans.of_counts(*_plain_arrays(column["spans"]))


def _labels_of(column: Mapping[str, pa.Array], num_rows: int) -> np.ndarray:
    if "labels" not in column:
        return np.zeros((num_rows, 0), np.float32)
    counts, values = _plain_arrays(column["labels"])
    if (counts != counts[:1]).any():
        raise ValueError("its rows have different numbers of labels")
    return values.reshape(num_rows, -1 if num_rows else 0)


def _span_lists(spans: RowSpans) -> pa.Array:
    fields = [pa.array(values) for values in (spans.starts, spans.stops, spans.weights)]
    offsets = pa.array(spans.offsets.astype(np.int32))
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(fields, fields=list(_SPAN))).cast(
        _SPANS.field("spans").type
    )


def _label_array(labels: Iterable[Sequence[float]], num_rows: int) -> np.ndarray:
    """Lay the labels of all rows, float32 [rows, labels]."""
    rows = list(labels) or [()] * num_rows
    lengths = sorted(set(map(len, rows)))
    if len(rows) != num_rows or len(lengths) > 1:
        raise ValueError(f"{num_rows} rows need as many labels each, got {len(rows)} with {lengths} labels")
    # A zero has one sign, so that equal labels have equal bytes.
    values = np.array(rows, np.float32).reshape(num_rows, -1 if num_rows else 0) + np.float32(0)
    if not np.isfinite(values).all():
        raise ValueError("a label of a row is not a finite number")
    return values
