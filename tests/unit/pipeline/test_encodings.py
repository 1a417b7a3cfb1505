"""Every numeric form holds to the error that its column states."""

import pytest
import torch

from pipeline.encodings import decode_hidden, decode_topk, encode_hidden, encode_topk, hidden_column, topk_column

N, D = 200, 12


@pytest.fixture
def states() -> torch.Tensor:
    """Channels of very different scale, and an attention sink at position 0 as real models have."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(N, D, generator=generator) * torch.logspace(-2, 2, D) + torch.linspace(-5, 5, D)
    values[0] *= 500
    return values


@pytest.mark.parametrize("encoding", ["int8", "float16", "bfloat16", "float32"])
def test_stored_arrays_have_the_dtypes_and_shapes_of_their_column(states, encoding):
    column = hidden_column("hidden/0/x", encoding=encoding, width=D)
    arrays = encode_hidden(states / 100, encoding=encoding)
    assert arrays.keys() == column.arrays.keys()
    for name, spec in column.arrays.items():
        assert str(arrays[name].dtype) == f"torch.{spec.dtype}"
        assert tuple(arrays[name].shape) == spec.full_shape(num_tokens=N, num_rows=1)
    assert column.attributes["error"]


def test_int8_is_within_half_a_step_of_each_channel_and_position(states):
    arrays = encode_hidden(states, encoding="int8")
    assert (arrays["values"].abs().amax(dim=1) == 127).all()
    step = arrays["scale"].unsqueeze(1) * arrays["spread"]
    error = (decode_hidden(arrays) - states).abs()
    assert (error <= 0.5 * step + 1e-5 * states.abs() + 1e-6).all()


def test_int8_spends_no_range_on_an_attention_sink(states):
    with_sink = decode_hidden(encode_hidden(states, encoding="int8"))
    without = decode_hidden(encode_hidden(states[1:], encoding="int8"))
    relative = [((got - want).square().mean(0) / want.var(0)).mean() for got, want in
                ((with_sink[1:], states[1:]), (without, states[1:]))]  # fmt: skip
    assert relative[1] < 4e-4
    assert relative[0] < 1.05 * relative[1]


@pytest.mark.parametrize(("encoding", "bound"), [("float16", 2**-11), ("bfloat16", 2**-8), ("float32", 0.0)])
def test_floating_forms_are_within_their_relative_error(states, encoding, bound):
    decoded = decode_hidden(encode_hidden(states, encoding=encoding))
    assert ((decoded - states).abs() <= bound * states.abs() + 2**-25).all()


def test_a_value_beyond_float16_is_refused_by_name(states):
    with pytest.raises(OverflowError, match=r"7e\+04 is beyond float16's 65504"):
        encode_hidden(torch.full((1, D), 7e4), encoding="float16")


def test_a_constant_channel_and_a_zero_position_survive_int8():
    states = torch.zeros(10, 3)
    states[:, 1] = 4.0
    assert torch.allclose(decode_hidden(encode_hidden(states, encoding="int8")), states, atol=1e-6)


def test_statistics_of_several_shards_decode_side_by_side(states):
    shards = [encode_hidden(part, encoding="int8") for part in states[:20].split(10)]
    batch = {name: torch.stack([shard[name] for shard in shards]) for name in shards[0]}
    alone = torch.stack([decode_hidden(shard) for shard in shards])
    assert torch.equal(decode_hidden(batch), alone)


@pytest.mark.parametrize("values", ["float16", "float32"])
@pytest.mark.parametrize("vocab_size", [300, 70_000])
def test_largest_logits_come_back_within_their_error_and_a_prefix_is_a_smaller_k(values, vocab_size):
    logits = 20 * torch.randn(N, vocab_size, generator=torch.Generator().manual_seed(0))
    top = logits.topk(16, dim=-1)
    column = topk_column("logits/topk/16/x", k=16, values=values, vocab_size=vocab_size)
    arrays = encode_topk(top.values, top.indices, column=column)
    for name, spec in column.arrays.items():
        assert str(arrays[name].dtype) == f"torch.{spec.dtype}"
    decoded, ids = decode_topk(arrays, k=16)
    offsets = (top.values[:, :1] - top.values).abs()
    bound = 2**-11 * offsets + 2**-25 + 4e-6 if values == "float16" else 0.0
    assert ((decoded - top.values).abs() <= bound).all()
    assert torch.equal(ids, top.indices)
    fewer, fewer_ids = decode_topk(arrays, k=4)
    assert torch.equal(fewer, decoded[:, :4])
    assert torch.equal(fewer_ids, ids[:, :4])
