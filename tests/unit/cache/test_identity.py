"""Names of rows, shards and stores, by content."""

import numpy as np
import pytest

from coldstill.cache.identity import digest_of, fingerprint, row_id, shard_id


def test_names_stay_what_stores_on_disk_are_called():
    assert fingerprint({"config": "c", "weights": "w", "dtype": "float32"}) == "c90885457a339879"
    assert digest_of({"b": 1, "a": "é"}) == "aa58fba8483623bed37c1b02edfccbdd9a53123837c20bfa4cb4049993a2872e"
    assert row_id(np.array([1, 2, 3])).hex() == "fba22a68bfaa3b0d30a951f0d4e14735"
    assert shard_id([bytes(16)]) == "1adbca7ef03df604"


def test_a_value_that_json_cannot_hold_has_no_digest():
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest_of({"loss": float("nan")})


@pytest.mark.parametrize("dtype", ["uint16", "int32", "uint32", "int64", ">i4", ">u2"])
def test_a_row_has_the_same_id_in_every_integer_dtype(dtype: str):
    tokens = [0, 1, 255, 256, 32_000]
    assert row_id(np.array(tokens, dtype)) == row_id(np.array(tokens, "uint64"))


def test_a_row_has_the_same_id_as_a_strided_view():
    tokens = np.arange(20)
    assert row_id(tokens[::2]) == row_id(tokens[::2].copy())


def test_any_change_of_any_token_changes_the_row_id():
    tokens = np.arange(40, dtype=np.int64)
    variants = [tokens, tokens[:-1], np.append(tokens, 0), tokens[::-1]]
    for position in range(len(tokens)):
        for delta in (1, 1 << 8, 1 << 16):
            variants.append(tokens.copy())
            variants[-1][position] += delta
    assert len({row_id(variant) for variant in variants}) == len(variants)


def test_a_row_of_two_dimensions_is_refused():
    with pytest.raises(ValueError, match=r"a row is one-dimensional, got shape \(2, 3\)"):
        row_id(np.zeros((2, 3), int))


def test_a_shard_is_named_by_its_rows_in_their_order():
    rows = [row_id(np.array([number])) for number in range(3)]
    assert shard_id(rows) == shard_id(iter(rows))
    assert len({shard_id(rows), shard_id(rows[::-1]), shard_id(rows[:2]), shard_id([])}) == 4
