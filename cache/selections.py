"""The rows of one run and split, in order: what a reader reads by, and what the run says of each row.

A table has one of two forms, and what it says decides which: where rows have nothing but prompts of weight 0, it is the
table that every version of format 3 wrote, so that the same rows keep their selection. Other spans, and labels of rows,
have columns of their own.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from coldstill.cache.array_object import REPAIR_HINT
from coldstill.cache.errors import CorruptError, FormatError, StoreNotFoundError
from coldstill.cache.identity import FINGERPRINT_CHARS
from coldstill.cache.labels import RowLabels
from coldstill.cache.records import Records
from coldstill.cache.row_lines import ROW_SCHEMA, RowLines, ids_of
from coldstill.cache.spans import RowSpans, Span, SpanSlice
from coldstill.cache.store import Store
from coldstill.cache.tables import GROUP_LINES, SUFFIX, check_columns, fetch, open_parquet, parquet_of, table_slices

SELECTIONS = "selections"

_PROVENANCE = b"provenance"
_SPAN = pa.struct([("start", pa.int32()), ("stop", pa.int32()), ("weight", pa.float32())])
_PROMPTS = ROW_SCHEMA.append(pa.field("loss_start", pa.int32()))
_SPANS = ROW_SCHEMA.append(pa.field("spans", pa.list_(_SPAN))).append(pa.field("labels", pa.list_(pa.float32())))
_PLACES = ("position", "start", "length")


@dataclass(frozen=True)
class Selection:
    """The rows of one run and split, in order; one entry a row, on disk where they are many.

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
    shard_numbers: Records
    positions: Records
    starts: Records
    lengths: Records
    spans: RowSpans
    labels: RowLabels
    provenance: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows; a row that occurs twice counts twice."""
        return sum(int(lengths.sum(dtype=np.int64)) for lengths in self.lengths.slices())


def make_selection(
    found: RowLines,
    spans: RowSpans | Iterable[Iterable[Span]],
    provenance: Mapping[str, Any],
    labels: RowLabels | Iterable[Sequence[float]] = (),
) -> Selection:
    """Name a selection of rows; writes nothing.

    Args:
        found: The rows, as `coldstill.cache.laying.places_of_rows` found them.
        spans: Of each row; none where all of its tokens weigh the same.
        provenance: Where the rows came from, as JSON takes it.
        labels: Of each row, as many for every row; none for rows without labels.

    Raises:
        ValueError: There are not as many spans or labels as rows, or one is not what it must be.
    """
    spans = spans if isinstance(spans, RowSpans) else RowSpans.of_rows(spans)
    labels = labels if isinstance(labels, RowLabels) else RowLabels.of_rows(labels, len(found))
    if not len(found) == len(spans) == len(labels):
        raise ValueError(f"{len(found)} rows have spans of {len(spans)} rows and labels of {len(labels)}")
    columns = {name: Records("<i4") for name in ("shard", *_PLACES)}
    for lines, of_rows in zip(found.lines.slices(), spans.slices(), strict=True):
        of_rows.check(lines["length"])
        for name, values in columns.items():
            values.append(lines[name])
    return _select(columns, found.names, spans, labels, _json(provenance), lambda: _row_ids(found))


def write_selection(
    store: Store,
    found: RowLines,
    spans: RowSpans | Iterable[Iterable[Span]],
    provenance: Mapping[str, Any],
    labels: RowLabels | Iterable[Sequence[float]] = (),
) -> Selection:
    """Publish the rows of one run, and return the selection; takes what `make_selection` takes."""
    selection = make_selection(found, spans, provenance, labels)
    file = selection_file(selection.name)
    if not store.objects.exists(file):
        with parquet_of(_tables(selection, found)) as parquet:
            store.objects.write_file(file, parquet)
    return selection


def read_selection(store: Store, name: str) -> Selection:
    """Read a selection by name.

    Raises:
        StoreNotFoundError: The store has no such selection.
        CorruptError: Its file is damaged.
        FormatError: It says something of rows that this version does not know.
    """
    file = selection_file(name)
    try:
        with fetch(store.objects, file) as data, open_parquet(data) as parquet:
            unknown = _unknown_columns(parquet.schema_arrow.names)
            if not unknown:
                return _parse(name, parquet)
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


def _select(
    columns: Mapping[str, Records],
    shard_names: Sequence[str],
    spans: RowSpans,
    labels: RowLabels,
    provenance: bytes,
    row_ids: Callable[[], Iterable[np.ndarray]],
) -> Selection:
    """Name a selection by all that it says, column by column, so that the name does not depend on how it is written."""
    hasher = hashlib.sha256(b"coldstill selection 2\0" if _is_older(spans, labels) else b"coldstill selection 3\0")
    hasher.update(provenance + b"\0" + "\n".join(shard_names).encode() + b"\0")
    for values in _in_order(columns, spans, labels, row_ids):
        hasher.update(values if isinstance(values, bytes) else values.tobytes())
    return Selection(
        name=hasher.hexdigest()[:FINGERPRINT_CHARS],
        shard_names=shard_names,
        shard_numbers=columns["shard"],
        positions=columns["position"],
        starts=columns["start"],
        lengths=columns["length"],
        spans=spans,
        labels=labels,
        provenance=json.loads(provenance or b"{}"),
    )


def _is_older(spans: RowSpans, labels: RowLabels) -> bool:
    """Whether the rows have nothing but prompts, which every version of format 3 can say."""
    return spans.are_prompts and not labels.num_labels


def _in_order(
    columns: Mapping[str, Records], spans: RowSpans, labels: RowLabels, row_ids: Callable[[], Iterable[np.ndarray]]
) -> Iterator[np.ndarray | bytes]:
    """Yield what a selection is named by behind its shards' names."""
    yield from columns["shard"].slices()
    yield from row_ids()
    for name in _PLACES:
        yield b"\0" + name.encode() + b"\0"
        yield from columns[name].slices()
    if _is_older(spans, labels):
        yield b"\0loss_start\0"
        yield from (part.prompt_lengths() for part in spans.slices())
        return
    yield b"\0spans\0"
    yield from (part.counts for part in spans.slices())
    for values in (spans.starts, spans.stops, spans.weights):
        yield from values.slices()
    yield b"\0labels\0"
    yield from (np.full(len(part), labels.num_labels, "<i4") for part in labels.slices())
    yield from labels.slices()


def _tables(selection: Selection, found: RowLines) -> Iterator[pa.Table]:
    """Yield a selection as the tables of a Parquet file's row groups."""
    metadata = {_PROVENANCE: _json(selection.provenance)}
    start = 0
    for table in found.tables(GROUP_LINES):
        stop = start + len(table)
        yield _with_said(table, selection, start, stop).replace_schema_metadata(metadata)
        start = stop
        del table  # while the next one is made


def _with_said(table: pa.Table, selection: Selection, start: int, stop: int) -> pa.Table:
    spans, labels = selection.spans, selection.labels
    if _is_older(spans, labels):
        return table.append_column(_PROMPTS.field("loss_start"), pa.array(spans.prompt_lengths(start, stop)))
    columns = {"spans": _span_lists(spans.part(start, stop)), "labels": _label_lists(labels.read(start, stop))}
    for name, values in columns.items():
        table = table.append_column(_SPANS.field(name), values)
    return table


def _unknown_columns(names: Sequence[str]) -> list[str]:
    """Name the columns of a selection that a later version wrote; none where it is no selection at all."""
    is_selection = set(ROW_SCHEMA.names).issubset(names) and not {"loss_start", "spans"}.isdisjoint(names)
    return [name for name in names if name not in {*_PROMPTS.names, *_SPANS.names}] if is_selection else []


def _parse(name: str, parquet: pq.ParquetFile) -> Selection:
    schema = _SPANS if "spans" in parquet.schema_arrow.names else _PROMPTS
    check_columns(parquet, schema)

    def column(name: str) -> Iterator[pa.Array]:
        for table in table_slices(parquet, [name]):
            yield table[name].combine_chunks().cast(schema.field(name).type)

    columns = {name: Records("<i4") for name in ("shard", *_PLACES)}
    shards: dict[str, int] = {}
    for values in column("shard"):
        plain = values.cast(pa.string()).dictionary_encode()
        numbers = [shards.setdefault(shard, len(shards)) for shard in plain.dictionary.to_pylist()]
        columns["shard"].append(np.array(numbers, np.int32)[plain.indices.to_numpy()])
    for place in _PLACES:
        for values in column(place):
            columns[place].append(values.to_numpy())
    if schema is _PROMPTS:
        spans = _parse_prompts(column("loss_start"))
        labels = RowLabels.of_rows((), len(spans))
    else:
        spans, labels = _parse_spans(column("spans")), _parse_labels(column("labels"))
    provenance = (parquet.schema_arrow.metadata or {}).get(_PROVENANCE, b"")
    selection = _select(columns, list(shards), spans, labels, provenance, lambda: map(ids_of, column("row")))
    if selection.name != name:
        raise ValueError("its content is not what it is named by")
    return selection


def _parse_prompts(column: Iterable[pa.Array]) -> RowSpans:
    spans = RowSpans()
    for values in column:
        spans.append_prompts(values.to_numpy())
    return spans


def _parse_spans(column: Iterable[pa.Array]) -> RowSpans:
    spans = RowSpans()
    for values in column:
        of_rows = values.flatten()
        starts, stops, weights = (of_rows.field(index).to_numpy() for index in range(3))
        spans.append(values.value_lengths().to_numpy(), starts, stops, weights)
    return spans


def _parse_labels(column: Iterable[pa.Array]) -> RowLabels:
    labels: RowLabels | None = None
    for values in column:
        counts = values.value_lengths().to_numpy()
        if labels is None:
            labels = RowLabels(int(counts[0]) if len(counts) else 0)
        if (counts != labels.num_labels).any():
            raise ValueError("its rows have different numbers of labels")
        labels.append(values.flatten().to_numpy().reshape(len(values), labels.num_labels))
    return RowLabels() if labels is None else labels


def _span_lists(spans: SpanSlice) -> pa.Array:
    fields = [pa.array(values) for values in (spans.starts, spans.stops, spans.weights)]
    offsets = pa.array(np.concatenate([[0], np.cumsum(spans.counts)]).astype(np.int32))
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(fields, fields=list(_SPAN))).cast(
        _SPANS.field("spans").type
    )


def _label_lists(labels: np.ndarray) -> pa.Array:
    num_rows, num_labels = labels.shape
    offsets = pa.array((np.arange(num_rows + 1) * num_labels).astype(np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(labels.reshape(-1))).cast(_SPANS.field("labels").type)


def _row_ids(found: RowLines) -> Iterator[np.ndarray]:
    return (lines["row"] for lines in found.lines.slices())


def _json(provenance: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(provenance), sort_keys=True).encode()
