import numpy as np
import pytest

from coldstill.cache.columns import DTYPES, ArraySpec, Column


def test_a_dtype_that_zarr_has_not_is_refused():
    with pytest.raises(ValueError, match=r"dtype 'bfloat16' is not one of int8, .*float64"):
        ArraySpec("bfloat16")


def test_an_empty_length_in_a_shape_is_refused():
    with pytest.raises(ValueError, match=r"every length of an array's shape must be positive, got \(3, 0\)"):
        ArraySpec("int8", (3, 0))


def test_an_array_of_the_shard_needs_a_shape():
    with pytest.raises(ValueError, match=r"store a single number with shape \(1,\)"):
        ArraySpec("float32", axis="shard")


@pytest.mark.parametrize("name", ["", "Hidden/1", "/hidden", "hidden/", "hidden//1", "hidden 1", "hidden~1"])
def test_a_column_name_that_is_no_path_of_lower_case_words_is_refused(name: str):
    with pytest.raises(ValueError, match="must be lower-case words joined by '/'"):
        Column(name, {"values": ArraySpec("int8")})


@pytest.mark.parametrize("name", ["tokens", "hidden/12/int8", "logsumexp/2.0", "label_logit"])
def test_a_column_name_of_lower_case_words_is_taken(name: str):
    assert Column(name, {"values": ArraySpec("int8")}).name == name


def test_a_column_without_arrays_is_refused():
    with pytest.raises(ValueError, match="column tokens has no arrays"):
        Column("tokens", {})


def test_the_axis_decides_the_full_shape_and_the_dimension_names():
    size = {"num_tokens": 100, "num_rows": 7}
    specs = [ArraySpec("int8", (3,), axis) for axis in ("token", "row", "shard")]
    assert [spec.full_shape(**size) for spec in specs] == [(100, 3), (7, 3), (3,)]
    assert [spec.dimension_names() for spec in specs] == [("token", None), ("row", None), (None,)]


@pytest.mark.parametrize("axis", ["token", "row", "shard"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (576,), (3, 64), (49_152,), (300_000,)])
def test_a_chunk_is_the_largest_power_of_two_within_its_bounds_or_one_index(dtype: str, shape: tuple[int, ...], axis):
    spec = ArraySpec(dtype, (1 << 30, *shape) if axis == "shard" else shape, axis)
    length = spec.chunk_length(1 << 30)
    index_bytes = np.dtype(dtype).itemsize * int(np.prod(shape))
    # At most 256 KiB; of tokens and rows at most 512, or 16 KiB where these are smaller.
    longest = (1 << 18) // index_bytes
    if axis != "shard":
        longest = min(longest, max(512, (1 << 14) // index_bytes))
    assert length & (length - 1) == 0
    assert length == 1 or length <= longest
    assert 2 * length > longest


def test_a_chunk_is_never_longer_than_its_array():
    assert ArraySpec("int8").chunk_length(1000) == 1000
    assert ArraySpec("float32", (7, 3), "shard").chunk_length(7) == 7


def test_a_column_survives_json(every_axis: Column):
    assert Column.from_json(every_axis.to_json()) == every_axis
