import hashlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_rows import found_rows

from coldstill.cache import selections
from coldstill.cache.errors import CorruptError, FormatError, StoreNotFoundError
from coldstill.cache.row_lines import RowLines
from coldstill.cache.selections import (
    Selection,
    list_selections,
    make_selection,
    read_selection,
    selection_file,
)
from coldstill.cache.spans import Span
from coldstill.cache.store import Store

LENGTHS = [4, 5, 6, 8, 2]
LOSS_STARTS = [1, 0, 5, 2, 0]
# What an earlier version called `loss_start` is a prompt of weight 0.
SPANS = [(Span(0, start, 0.0),) if start else () for start in LOSS_STARTS]
PROVENANCE = {"tokenizer": "sha256 9c41", "dropped": {"too short": 3}, "source": "wikitext é"}

pytestmark = pytest.mark.usefixtures("small_shards")


def find(store: Store, rows: list[np.ndarray]) -> pa.Table:
    return found_rows(store, rows).table()


def write(store: Store, found: pa.Table, *said: Any) -> Selection:
    return selections.write_selection(store, RowLines.of_tables([found]), *said)


def make(found: pa.Table, *said: Any) -> Selection:
    return make_selection(RowLines.of_tables([found]), *said)


def assert_same_selection(first: Selection, second: Selection) -> None:
    assert (first.name, dict(first.provenance)) == (second.name, dict(second.provenance))
    assert list(first.shard_names) == list(second.shard_names)
    for field in ("shard_numbers", "positions", "starts", "lengths"):
        values = getattr(first, field)
        assert values.dtype == np.int32
        np.testing.assert_array_equal(values, getattr(second, field))
    assert list(first.spans) == list(second.spans)
    np.testing.assert_array_equal(first.labels, second.labels, strict=True)


@pytest.fixture
def found(store: Store, make_rows, lay) -> pa.Table:
    rows = make_rows(LENGTHS)
    lay(store, rows)
    return find(store, rows)


@pytest.fixture
def selection(store: Store, found: pa.Table) -> Selection:
    return write(store, found, SPANS, PROVENANCE)


def file_of(store: Store, selection: Selection) -> Path:
    return Path(store.path, selection_file(selection.name))


def test_a_selection_reads_back_with_prompts_and_provenance(store: Store, selection: Selection):
    assert len(selection) == len(LENGTHS)
    assert selection.num_tokens == sum(LENGTHS)
    assert list(selection.spans) == SPANS
    assert selection.labels.shape == (len(LENGTHS), 0)
    assert selection.provenance == PROVENANCE
    assert selection.lengths.tolist() == LENGTHS
    assert_same_selection(read_selection(store, selection.name), selection)


def test_each_row_of_a_selection_has_the_place_where_it_was_found(store: Store, found: pa.Table, selection: Selection):
    for index, line in enumerate(found.to_pylist()):
        assert selection.shard_names[selection.shard_numbers[index]] == line["shard"]
        assert (selection.positions[index], selection.starts[index]) == (line["position"], line["start"])


def test_a_selections_shards_are_named_once_in_the_order_of_its_rows(store: Store, make_rows, selection: Selection):
    rows = make_rows(LENGTHS)
    assert len(selection.shard_names) == len(set(selection.shard_names)) == 3
    last = write(store, find(store, [rows[4], rows[0], rows[3], rows[1]]), [()] * 4, {})
    assert list(last.shard_names) == [selection.shard_names[index] for index in (2, 0)]
    assert last.shard_numbers.tolist() == [0, 1, 0, 1]


def test_the_same_selection_has_the_same_name_and_another_has_another(
    store: Store, found: pa.Table, selection: Selection
):
    assert write(store, found, SPANS, PROVENANCE).name == selection.name
    others = [
        write(store, found, [*SPANS[:-1], (Span(0, 1, 0.0),)], PROVENANCE),
        write(store, found.take([1, 0, 2, 3, 4]), [SPANS[index] for index in (1, 0, 2, 3, 4)], PROVENANCE),
        write(store, found.slice(0, 4), SPANS[:4], PROVENANCE),
        write(store, found, SPANS, {**PROVENANCE, "tokenizer": "another"}),
    ]
    assert len({selection.name, *(other.name for other in others)}) == 5
    tail = write(store, found.slice(2, 2), SPANS[2:4], {})
    for written in (*others, tail):
        assert_same_selection(read_selection(store, written.name), written)
    assert {selection.name, *(other.name for other in others)} <= set(list_selections(store))
    assert len(list_selections(store)) == len(set(list_selections(store)))
    assert [dict(other.provenance) for other in others[:3]] == [PROVENANCE] * 3


def test_writing_a_selection_again_leaves_its_file_alone(store: Store, found: pa.Table, selection: Selection, tree):
    before = tree(store.path)
    file = file_of(store, selection)
    written = file.stat().st_mtime_ns
    write(store, found, SPANS, dict(reversed(PROVENANCE.items())))
    assert (tree(store.path), file.stat().st_mtime_ns) == (before, written)


def test_making_a_selection_writes_nothing(store: Store, found: pa.Table, tree):
    before = tree(store.path)
    made = make(found, SPANS, PROVENANCE)
    assert tree(store.path) == before
    assert_same_selection(made, write(store, found, SPANS, PROVENANCE))


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "none"},
        {"compression": "snappy", "data_page_version": "2.0"},
        {"use_dictionary": False},
        {"row_group_size": 2},
        {"row_group_size": 1, "use_dictionary": False, "compression": "gzip"},
        {"write_statistics": False, "version": "1.0"},
    ],
    ids=lambda options: ", ".join(f"{key}={value}" for key, value in options.items()),
)
def test_a_selections_name_does_not_depend_on_how_parquet_wrote_it(
    store: Store, found: pa.Table, selection: Selection, options: dict
):
    file = file_of(store, selection)
    sink = io.BytesIO()
    pq.write_table(pq.read_table(file), sink, **options)
    assert sink.getvalue() != file.read_bytes()
    file.write_bytes(sink.getvalue())
    assert_same_selection(read_selection(store, selection.name), selection)


def test_a_selections_name_does_not_depend_on_where_its_rows_were_found_among_others(
    store: Store, found: pa.Table, make_rows, lay, selection: Selection
):
    lay(store, make_rows([7, 3, 10], first=20))
    again = find(store, make_rows(LENGTHS))
    assert again["row"].equals(found["row"])
    sliced = pa.concat_tables([again.slice(0, 2), again.slice(2)])
    assert make(sliced, SPANS, PROVENANCE).name == selection.name


TWO_ROWS = {
    "row": pa.array([bytes(16), b"\1" * 16], pa.binary(16)),
    "shard": pa.array(["s1", "s0"], pa.string()).dictionary_encode(),
    "position": pa.array([0, 1], pa.int32()),
    "start": pa.array([0, 5], pa.int32()),
    "length": pa.array([5, 2], pa.int32()),
}


def test_a_selections_name_stays_what_files_on_disk_are_called():
    prompt = (Span(0, 1, 0.0),)
    assert make(pa.table(TWO_ROWS), [(), prompt], {"source": "é"}).name == "423a16f81e2efec0"


def test_a_selection_of_no_rows_reads_back(store: Store, found: pa.Table):
    empty = write(store, found.slice(0, 0), [], PROVENANCE)
    assert (len(empty), empty.num_tokens, list(empty.shard_names)) == (0, 0, [])
    assert_same_selection(read_selection(store, empty.name), empty)


def test_an_unknown_selection_is_not_found(store: Store):
    with pytest.raises(StoreNotFoundError, match=r"has no selections/0123\.parquet; run: coldstill precompute"):
        read_selection(store, "0123")
    assert list_selections(store) == []


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-9], lambda data: b"<html>" + data[6:-8]])
def test_a_damaged_selection_is_corrupt_by_name(store: Store, selection: Selection, damage):
    file = file_of(store, selection)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CorruptError, match=rf"selections/{selection.name}\.parquet of store .* is corrupt") as caught:
        read_selection(store, selection.name)
    assert store.path in str(caught.value)


def test_a_selection_under_anothers_name_is_corrupt(store: Store, selection: Selection):
    file = file_of(store, selection)
    file.rename(file.with_name("0123456789abcdef.parquet"))
    with pytest.raises(
        CorruptError, match=r"selections/0123456789abcdef\.parquet of store .* its content is not what it is named by"
    ):
        read_selection(store, "0123456789abcdef")


def test_a_file_of_rows_is_no_selection(store: Store, selection: Selection):
    (rows,) = Path(store.path, "rows").iterdir()
    Path(store.path, "selections", rows.name).write_bytes(rows.read_bytes())
    with pytest.raises(CorruptError, match=rf"selections/{rows.name} of store .* is corrupt: its columns are"):
        read_selection(store, rows.stem)


# Three spans in one row, none in the next, and a prompt of weight 0 in the last; two labels a row.
MORE = [(Span(0, 1, 0.0), Span(1, 2, 0.25), Span(3, 4, 2.0)), (), (), (Span(2, 8, 0.5),), (Span(0, 1, 0.0),)]
LABELS = [(0.0, float(index)) for index in range(5)]


def test_spans_and_labels_read_back_as_they_were_given(store: Store, found: pa.Table, selection: Selection):
    written = write(store, found, MORE, PROVENANCE, LABELS)
    assert written.name != selection.name
    read = read_selection(store, written.name)
    assert_same_selection(read, written)
    assert list(read.spans) == MORE
    assert read.labels.tolist() == [list(labels) for labels in LABELS]
    assert np.asarray(read.labels).dtype == np.float32


@pytest.mark.parametrize(
    ("spans", "labels", "columns"),
    [
        (SPANS, (), ["loss_start"]),
        ([()] * 5, [()] * 5, ["loss_start"]),
        ([(Span(0, 2, 1.0),)] * 5, (), ["loss_start"]),
        ([*SPANS[:-1], (Span(1, 2, 0.0),)], (), ["spans", "labels"]),
        ([*SPANS[:-1], (Span(0, 1, 0.5),)], (), ["spans", "labels"]),
        ([*SPANS[:-1], (Span(0, 1, 0.0), Span(1, 2, 0.0))], (), ["spans", "labels"]),
        (SPANS, LABELS, ["spans", "labels"]),
    ],
)
def test_only_a_selection_that_says_more_than_prompts_has_the_newer_columns(
    store: Store, found: pa.Table, spans, labels, columns
):
    written = write(store, found, spans, PROVENANCE, labels)
    assert pq.read_schema(file_of(store, written)).names == [*found.schema.names, *columns]


def test_all_that_a_selection_says_of_its_rows_is_in_its_name(store: Store, found: pa.Table):
    moved = [MORE[0], (), (Span(0, 3, 0.25),), (Span(2, 8, 0.5),), (Span(0, 1, 0.0),)]
    said = [
        (MORE, ()),
        (MORE, LABELS),
        (MORE, [(first, second + 1) for first, second in LABELS]),
        (moved, ()),
        ([(), MORE[0], (), *MORE[3:]], ()),
        ([MORE[0][:2], *MORE[1:]], ()),
        ([()] * 5, LABELS),
        ([()] * 5, [(label,) for _, label in LABELS]),
    ]
    assert len({make(found, spans, PROVENANCE, labels).name for spans, labels in said}) == len(said)
    negative = [(Span(0, 1, -0.0), *MORE[0][1:]), *MORE[1:]]
    assert make(found, negative, PROVENANCE).name == make(found, MORE, PROVENANCE).name


def test_the_name_of_a_selection_with_spans_and_labels_stays_what_files_on_disk_are_called():
    name = make(pa.table(TWO_ROWS), [(Span(1, 3, 0.5),), ()], {"source": "é"}, [(1.0,), (-2.5,)]).name
    rows = bytes(16) + b"\1" * 16
    parts = [b"coldstill selection 3\0", rb'{"source": "\u00e9"}', b"\0s1\ns0\0", ints(0, 1), rows]
    parts += [b"\0position\0", ints(0, 1), b"\0start\0", ints(0, 5), b"\0length\0", ints(5, 2)]
    parts += [b"\0spans\0", ints(1, 0), ints(1), ints(3), np.array([0.5], "<f4").tobytes()]
    parts += [b"\0labels\0", ints(1, 1), np.array([1, -2.5], "<f4").tobytes()]
    assert name == hashlib.sha256(b"".join(parts)).hexdigest()[:16] == "f0c8cdf4922281a6"


def ints(*values: int) -> bytes:
    return np.array(values, "<i4").tobytes()


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ((Span(2, 2, 0.0),), "Span(start=2, stop=2, weight=0.0) of a row of 4 tokens: spans ascend"),
        ((Span(0, 5, 0.0),), "Span(start=0, stop=5, weight=0.0) of a row of 4 tokens: spans ascend"),
        ((Span(-1, 2, 0.0),), "Span(start=-1, stop=2, weight=0.0) of a row of 4 tokens: spans ascend"),
        ((Span(0, 2, 0.0), Span(1, 3, 0.5)), "Span(start=1, stop=3, weight=0.5) of a row of 4 tokens: spans ascend"),
        ((Span(0, 2, -0.5),), "Span(start=0, stop=2, weight=-0.5) has no weight: expected a finite number"),
        ((Span(0, 2, float("nan")),), "Span(start=0, stop=2, weight=nan) has no weight: expected a finite number"),
    ],
)
def test_spans_that_contradict_their_row_are_refused(found: pa.Table, spans, message: str):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make(found, [spans, *SPANS[1:]], PROVENANCE)


@pytest.mark.parametrize("labels", [LABELS[:4], [*LABELS[:4], (1.0,)], [*LABELS[:4], (0.0, float("inf"))]])
def test_labels_that_are_not_as_many_numbers_for_every_row_are_refused(found: pa.Table, labels):
    with pytest.raises(ValueError, match="labels each, got|is not a finite number"):
        make(found, SPANS, PROVENANCE, labels)


def test_a_selection_with_columns_of_a_later_version_is_refused_in_one_line(store: Store, found: pa.Table):
    name = write(store, found, MORE, PROVENANCE).name
    later = pq.read_table(Path(store.path, selection_file(name)))
    later = later.append_column("boundaries", pa.array([[1]] * 5)).append_column("domains", pa.array(["a"] * 5))
    pq.write_table(later, Path(store.path, selection_file(name)))
    with pytest.raises(FormatError) as caught:
        read_selection(store, name)
    assert str(caught.value) == (
        f"selections/{name}.parquet of store {store.path} says more of its rows than this version of Coldstill knows: "
        "boundaries, domains; install a newer Coldstill, or run: coldstill precompute"
    )
