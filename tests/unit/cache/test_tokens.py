import numpy as np
import pytest
from store_rows import laid_rows, shard_rows

from coldstill.cache.arrays import read_column
from coldstill.cache.identity import row_id, shard_id
from coldstill.cache.laying import LaidRows
from coldstill.cache.manifest import Manifest
from coldstill.cache.row_lines import sorted_lines
from coldstill.cache.rows import read_rows
from coldstill.cache.store import Store
from coldstill.cache.tokens import LENGTHS, TOKENS, rows_of_tokens, token_column, write_tokens

pytestmark = pytest.mark.usefixtures("small_shards")


def lay_tokens(store: Store, rows: list[np.ndarray], *, vocab_size: int = 65_536) -> LaidRows:
    """Lay rows and commit their tokens, without making them known."""
    laid = laid_rows(store, rows)
    write(store, laid, rows, vocab_size=vocab_size)
    return laid


def write(store: Store, laid: LaidRows, rows: list[np.ndarray], *, vocab_size: int = 65_536) -> None:
    write_tokens(store, Manifest(store), laid, lambda indices: [rows[i] for i in indices], vocab_size=vocab_size)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(384, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_ids_are_as_wide_as_the_vocabulary_needs(store: Store, vocab_size: int, dtype: str):
    column = token_column(vocab_size=vocab_size)
    assert (column.name, column.arrays["ids"].dtype, column.attributes["vocab_size"]) == (TOKENS, dtype, vocab_size)
    rows = [np.array([0, vocab_size - 1], "int64")]
    (shard,) = lay_tokens(store, rows, vocab_size=vocab_size).rows.names
    ids = read_column(store, Manifest(store).record(shard, TOKENS))["ids"]
    assert (ids.dtype, ids.tolist()) == (np.dtype(dtype), [0, vocab_size - 1])


def test_a_shard_holds_the_tokens_of_its_rows_in_order_and_their_lengths(store: Store, make_rows):
    rows = make_rows([4, 6, 3, 12])
    laid = lay_tokens(store, rows)
    manifest = Manifest(store)
    assert sorted(manifest.shards(TOKENS)) == sorted(laid.rows.names)
    for members in (rows[:2], rows[2:3], rows[3:]):
        record = manifest.record(shard_id([row_id(row) for row in members]), TOKENS)
        assert (record.num_tokens, record.num_rows) == (sum(map(len, members)), len(members))
        values = read_column(store, record)
        assert values["ids"].tolist() == np.concatenate(members).tolist()
        assert values[LENGTHS].tolist() == [len(row) for row in members]


def test_the_rows_of_every_shard_are_rebuilt_from_its_tokens_alone(store: Store, make_rows, lay):
    lay(store, make_rows([4, 6, 3, 12, 1, 1, 1]))
    known = read_rows(store)
    manifest = Manifest(store)
    rebuilt = []
    for record in manifest.records():
        rebuilt.append(rows_of_tokens(record, read_column(store, record)))
        table = rebuilt[-1].table()
        assert shard_id(table["row"].to_pylist()) == record.shard
        assert table.to_pylist() == shard_rows(store, [record.shard])[record.shard].to_pylist()
    assert sorted_lines(rebuilt[::-1]).table().equals(known)


def test_committed_tokens_are_not_written_again(store: Store, make_rows, tree):
    rows = make_rows([4, 6, 3])
    laid = lay_tokens(store, rows)
    before = tree(store.path)
    write(store, laid, rows)
    assert tree(store.path) == before


def test_a_death_between_two_shards_tokens_leaves_the_rest_to_be_written(store: Store, make_rows, tree):
    rows = make_rows([4, 6, 3])
    laid = lay_tokens(store, rows)
    expected = tree(store.path)
    shard = laid.rows.names[-1]
    store.objects.remove(f"commits/{shard}~tokens.json")
    store.objects.remove_folder(f"arrays.zarr/shards/{shard}")
    assert lay_tokens(store, rows).rows.table().equals(laid.rows.table())
    assert tree(store.path) == expected


def test_laying_no_rows_commits_nothing(store: Store, tree):
    before = tree(store.path)
    lay_tokens(store, [])
    assert tree(store.path) == before
