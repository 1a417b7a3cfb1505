"""Every numeric form holds to the error that its column states."""

import pytest
import torch

from coldstill.pipeline.targets.encodings import StateForm, decode_state, encode_state, ordinary_positions, state_column
from coldstill.pipeline.targets.transform_coding import fit_code

N, D = 200, 12
INT8 = StateForm("int8")


def round_trip(states: torch.Tensor, form: StateForm) -> torch.Tensor:
    return decode_state(encode_state(states, form=form), form=form)


@pytest.fixture
def states() -> torch.Tensor:
    """Channels of very different scale, and an attention sink at position 0 as real models have."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(N, D, generator=generator) * torch.logspace(-2, 2, D) + torch.linspace(-5, 5, D)
    values[0] *= 500
    return values


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("encoding", ["int8", "coded", "float16", "bfloat16", "float32"])
def test_stored_arrays_have_the_dtypes_and_shapes_of_their_column(states, encoding, fraction):
    coded = encoding == "coded"
    form, code = StateForm(encoding, 0.5 if coded else None, fraction), fit_code(states) if coded else None
    column = state_column("hidden/0/x", form=form, width=D, code=code)
    stored = torch.arange(N) % 2 == 0 if fraction < 1 else None
    arrays = encode_state(states / 100, form=form, code=code, stored_N=stored)
    assert arrays.keys() == column.arrays.keys()
    for name, spec in column.arrays.items():
        assert str(arrays[name].dtype) == f"torch.{spec.dtype}"
        assert tuple(arrays[name].shape) == spec.full_shape(num_tokens=N, num_rows=1)
    assert column.attributes["error"]


def test_int8_is_within_half_a_step_of_each_channel_and_position(states):
    arrays = encode_state(states, form=INT8)
    # Where nothing overflows, the largest channel is 127; where an outlier does, the others still fill the range.
    levels = arrays["values"].int() + 255 * arrays["overflow"].int()
    plain = (arrays["overflow"] == 0).all(dim=1)
    assert plain.any()
    assert (levels[plain].abs().amax(dim=1) == 127).all()
    assert (levels[~plain].abs().amax(dim=1) > 127).all()
    step = arrays["scale"].unsqueeze(1) * arrays["spread"]
    error = (decode_state(arrays, form=INT8) - states).abs()
    assert (error <= 0.5 * step + 1e-5 * states.abs() + 1e-6).all()


def test_int8_spends_no_range_on_an_attention_sink(states):
    with_sink = round_trip(states, INT8)
    without = round_trip(states[1:], INT8)
    relative = [((got - want).square().mean(0) / want.var(0)).mean() for got, want in
                ((with_sink[1:], states[1:]), (without, states[1:]))]  # fmt: skip
    assert relative[1] < 4e-4
    assert relative[0] < 1.05 * relative[1]


@pytest.mark.parametrize(("encoding", "bound"), [("float16", 2**-11), ("bfloat16", 2**-8), ("float32", 0.0)])
def test_floating_forms_are_within_their_relative_error(states, encoding, bound):
    decoded = round_trip(states, StateForm(encoding))
    assert ((decoded - states).abs() <= bound * states.abs() + 2**-25).all()


def test_a_value_beyond_float16_is_refused_by_name(states):
    with pytest.raises(OverflowError, match=r"7e\+04 is beyond float16's 65504"):
        encode_state(torch.full((1, D), 7e4), form=StateForm("float16"))


def test_a_constant_channel_and_a_zero_position_survive_int8():
    states = torch.zeros(10, 3)
    states[:, 1] = 4.0
    assert torch.allclose(round_trip(states, INT8), states, atol=1e-6)


def test_statistics_of_several_shards_decode_side_by_side(states):
    shards = [encode_state(part, form=INT8) for part in states[:20].split(10)]
    batch = {name: torch.stack([shard[name] for shard in shards]) for name in shards[0]}
    alone = torch.stack([decode_state(shard, form=INT8) for shard in shards])
    assert torch.equal(decode_state(batch, form=INT8), alone)


def test_an_outlier_channel_takes_no_range_from_the_others():
    states = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    outlier = states.clone()
    outlier[5, 3] = 400.0  # some 14 spreads of its channel, which it sets itself
    arrays = encode_state(outlier, form=INT8)
    assert arrays["overflow"][5].count_nonzero() == 1
    assert arrays["overflow"][5, 3] != 0
    decoded = decode_state(arrays, form=INT8)
    step = arrays["scale"].unsqueeze(1) * arrays["spread"]
    assert ((decoded - outlier).abs() <= 0.5 * step + 1e-5 * outlier.abs() + 1e-6).all()
    others = torch.arange(D) != 3
    assert (decoded[5] - outlier[5])[others].abs().max() < 0.03, "half a step of the outlier's own scale is 0.055"


def test_a_channel_beyond_any_overflow_sets_the_scale_after_all():
    states = torch.zeros(N, D)
    states[:, 0] = torch.arange(N) % 2
    states[7, 0] = 1e4
    arrays = encode_state(states, form=INT8)
    step = arrays["scale"].unsqueeze(1) * arrays["spread"]
    error = (decode_state(arrays, form=INT8) - states).abs()
    assert (error <= 0.5 * step + 1e-5 * states.abs() + 1e-6).all()


def test_coded_states_are_within_half_a_step_in_each_coefficient(states):
    form, code = StateForm("coded", 0.25), fit_code(states)
    decoded = decode_state(encode_state(states, form=form, code=code), form=form, code=code)
    error = (decoded.double() - states.double()) @ code.analysis_DD.double()
    assert error.abs().max() <= 0.5 * 0.25 * 1.01 + 1e-3, "float32 holds 7 digits of the sink's norm of 50,000"


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (StateForm("int8"), "int8"),
        (StateForm("coded", 0.03), "coded_0.03"),
        (StateForm("coded", 2.0, 0.5), "coded_2_sampled_0.5"),
        (StateForm("float32", fraction=0.25), "float32_sampled_0.25"),
    ],
    ids=str,
)
def test_a_form_is_its_text_and_back(form, text):
    assert str(form) == text
    assert StateForm.parse(text) == form


@pytest.mark.parametrize("encoding", ["int8", "coded", "float16", "bfloat16", "float32"])
def test_positions_that_are_not_stored_are_zeros_and_the_others_as_ever(states, encoding):
    states, coded = states / 100, encoding == "coded"
    step, code = 0.01 if coded else None, fit_code(states) if coded else None
    whole = encode_state(states, form=StateForm(encoding, step), code=code)
    stored = torch.rand(N, generator=torch.Generator().manual_seed(2)) < 0.5
    sampled = encode_state(states, form=StateForm(encoding, step, 0.5), code=code, stored_N=stored)
    assert torch.equal(sampled.pop("stored").bool(), stored)
    assert sampled.keys() == whole.keys()
    for name, values in whole.items():
        if name in ("centre", "spread"):
            assert torch.equal(sampled[name], values)
        else:
            assert torch.equal(sampled[name][stored], values[stored])
            assert not sampled[name][~stored].any()


def test_statistics_of_a_shard_of_as_many_positions_as_channels_are_not_taken_for_positions():
    states = torch.randn(D, D, generator=torch.Generator().manual_seed(3))
    whole = encode_state(states, form=INT8)
    none = encode_state(states, form=StateForm("int8", fraction=0.5), stored_N=torch.zeros(D, dtype=torch.bool))
    assert torch.equal(none["centre"], whole["centre"])
    assert torch.equal(none["spread"], whole["spread"])


def test_an_attention_sink_is_no_ordinary_position(states):
    assert ordinary_positions(states).tolist() == [False] + [True] * (N - 1)
