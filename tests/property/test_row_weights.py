"""Whatever spans and labels rows have: a selection gives them back, and a batch weighs each token as they say."""

from typing import Any
from unittest import mock
from uuid import uuid4

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from coldstill.cache.identity import row_id
from coldstill.cache.row_lines import RowLines
from coldstill.cache.rows import rows_of_shard
from coldstill.cache.selections import make_selection, read_selection, write_selection
from coldstill.cache.spans import RowSpans, Span, token_weights
from coldstill.cache.store import create_store
from coldstill.pipeline.models.labels import IGNORED
from coldstill.pipeline.stage_two.batches import BatchCollator, BatchColumns, StoredRow

weights = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 100, width=32))
COLLATE = BatchCollator(BatchColumns(logits={}, hidden={}), {"tokens": {"ids": "token"}})

Said = tuple[int, tuple[Span, ...], tuple[float, ...]]


@st.composite
def said_of_rows(draw: st.DrawFn) -> list[Said]:
    """Give rows by length, each with spans that ascend within it and labels, as many for every row."""
    how_many = draw(st.integers(0, 3))
    rows = []
    for length in draw(st.lists(st.integers(1, 12), max_size=6)):
        edges = draw(st.lists(st.integers(0, length), unique=True, max_size=6).map(sorted))
        spans = [Span(*edge, draw(weights)) for edge in zip(edges[::2], edges[1::2], strict=False)]
        labels = draw(st.lists(st.floats(-1e6, 1e6, width=32), min_size=how_many, max_size=how_many))
        rows.append((length, tuple(spans), tuple(labels)))
    return rows


def found_rows(lengths: list[int]) -> RowLines:
    """Give rows as they are found in a store: all in one shard, behind one another."""
    ids = [row_id(np.full(length, index)) for index, length in enumerate(lengths)]
    return rows_of_shard("s0", np.frombuffer(b"".join(ids), "V16"), lengths)


def said(rows: list[Said]) -> dict[str, Any]:
    return {"spans": [spans for _, spans, _ in rows], "labels": [labels for _, _, labels in rows]}


@settings(max_examples=100, deadline=None)
@given(said_of_rows())
def test_spans_give_each_token_its_weight_whether_laid_together_or_not(rows):
    laid = RowSpans.of_rows([spans for _, spans, _ in rows])
    assert len(laid) == len(rows)
    for (length, spans, _), read in zip(rows, laid, strict=True):
        expected = [
            next((np.float32(span.weight) for span in spans if span.start <= token < span.stop), 1.0)
            for token in range(length)
        ]
        assert token_weights(read, length).tolist() == token_weights(spans, length).tolist() == expected
    if laid.are_prompts:
        again = RowSpans()
        for part in laid.slices(2):
            again.append_prompts(part.prompt_lengths())
        assert list(again) == list(laid)


@settings(max_examples=60, deadline=None)
@given(said_of_rows(), st.integers(1, 3))
def test_a_selection_gives_back_what_was_said_of_rows_and_is_named_by_it(rows, group_lines: int):
    found = found_rows([length for length, _, _ in rows])
    store = create_store(f"memory://{uuid4().hex}", {"identity": {"weights": "w"}})
    with mock.patch("coldstill.cache.selections.GROUP_LINES", group_lines):
        written = write_selection(store, found, provenance={"n": 1}, **said(rows))
    selection = read_selection(store, written.name)
    for index, (length, spans, labels) in enumerate(rows):
        assert token_weights(selection.spans[index], length).tolist() == token_weights(spans, length).tolist()
        assert selection.labels[index].tolist() == list(labels)
    again = make_selection(found, list(selection.spans), selection.provenance, selection.labels.tolist())
    assert again.name == selection.name


@settings(max_examples=60, deadline=None)
@given(said_of_rows(), said_of_rows())
def test_two_selections_of_the_same_rows_share_a_name_only_where_they_say_the_same(first, second):
    second = [(length, *rest) for (length, _, _), (_, *rest) in zip(first, second, strict=False)]
    first = first[: len(second)]
    found = found_rows([length for length, _, _ in first])
    second = [
        (length, tuple(span for span in spans if span.stop <= length), labels) for length, spans, labels in second
    ]
    names, whats = zip(
        *(
            (
                make_selection(found, provenance={}, **said(rows)).name,
                [([span for span in spans if span.weight != 1], labels) for _, spans, labels in rows],
            )
            for rows in (first, second)
        ),
        strict=True,
    )
    assert (names[0] == names[1]) == (whats[0] == whats[1])


@settings(max_examples=60, deadline=None)
@given(said_of_rows().filter(bool))
def test_a_batch_ignores_what_weighs_nothing_and_weighs_what_it_does_not_ignore(rows):
    stored = [
        StoredRow({"tokens": {"ids": np.arange(7, 7 + length, dtype=np.uint16)}}, spans, np.array(labels, np.float32))
        for length, spans, labels in rows
    ]
    batch = COLLATE(stored)
    longest = max(length for length, _, _ in rows)
    expected = np.zeros((len(rows), longest), np.float32)
    for index, (length, spans, _) in enumerate(rows):
        expected[index, 1:length] = token_weights(spans, length)[1:]
    labels = np.where(expected > 0, np.arange(7, 7 + longest), IGNORED)
    assert batch["labels"].tolist() == labels.tolist()
    assert ("weights" in batch) == bool(((expected != 0) & (expected != 1)).any())
    if "weights" in batch:
        assert batch["weights"].tolist() == expected.tolist()
    assert ("row_labels" in batch) == (len(rows[0][2]) > 0)
    if "row_labels" in batch:
        assert batch["row_labels"].tolist() == [list(labels) for _, _, labels in rows]
