"""Cutting neurons and channels: what may not change does not, and what is read stays near what it was."""

import pytest
import torch
from hooks import has_hooks
from transformers import AutoModelForCausalLM

from coldstill.pipeline.models import take_apart
from coldstill.pipeline.runtime.errors import ModelError
from coldstill.pipeline.students.axes import parameter_axes
from coldstill.pipeline.students.norms import scaled_weight
from coldstill.pipeline.students.width import (
    channel_importances,
    most_important,
    narrow_mlps,
    narrow_stream,
    neuron_importances,
    neurons_kept,
)

LLAMA_LIKE = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "smollm3"]
ROWS = [torch.randint(1, 384, (length,), generator=torch.Generator().manual_seed(length)) for length in (24, 17, 30)]
MANY_ROWS = [torch.randint(1, 384, (40,), generator=torch.Generator().manual_seed(row)) for row in range(24)]
HEADS = {"head_dim": 8}


def logits(model, row=ROWS[0]):
    with torch.no_grad():
        return model(input_ids=row.unsqueeze(0)).logits[0]


@pytest.mark.parametrize("architecture", LLAMA_LIKE)
def test_all_channels_and_all_neurons_kept_in_another_order_leave_the_logits(build_model, architecture):
    model = build_model(architecture, **HEADS)
    expected = logits(model)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    narrowed = narrow_stream(take_apart(model), order, rows=[])
    torch.testing.assert_close(logits(narrowed), expected, atol=2e-4, rtol=1e-4)
    neurons = [torch.randperm(48, generator=torch.Generator().manual_seed(block)) for block in range(4)]
    torch.testing.assert_close(logits(narrow_mlps(take_apart(model), neurons)), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", LLAMA_LIKE)
@pytest.mark.parametrize("tied", [True, False])
def test_channels_that_carry_nothing_go_without_a_trace(build_model, architecture, tied):
    """Where the removed channels are zero at every position, slicing and the norms' new scale are exact."""
    model = build_model(architecture, tie_word_embeddings=tied, **HEADS)
    silent = torch.arange(20, 32)
    with torch.no_grad():
        for name, axes in parameter_axes(take_apart(model)).items():
            value = model.get_parameter(name)
            if value.dim() == 2:
                value *= 3.0  # well above the norms' epsilon, which is added to a mean over fewer channels
            if axes[0] == "channels" and value.dim() == 2:
                value[silent] = 0.0
            elif (
                name.endswith("layernorm.weight")
                and ("post" in name)
                and architecture in ("gemma2", "gemma3_text", "olmo2")
            ):
                value[silent] = -1.0 if "gemma" in architecture else 0.0
        model.get_input_embeddings().weight[:, silent] = 0.0
    narrowed = narrow_stream(take_apart(model), torch.arange(20), MANY_ROWS)
    assert narrowed.config.hidden_size == 20
    scale = logits(model).abs().max()
    # The ridge of the correction, a thousandth, is what remains.
    assert (logits(narrowed) - logits(model)).abs().max() < 0.02 * scale


@pytest.mark.parametrize("architecture", LLAMA_LIKE)
def test_a_corrected_narrow_model_is_nearer_to_the_teacher_than_a_sliced_one(build_model, architecture):
    model = build_model(architecture, **HEADS)
    parts = take_apart(model)
    channels = most_important(channel_importances(parts, MANY_ROWS), 28)
    corrected, sliced = narrow_stream(parts, channels, MANY_ROWS), narrow_stream(parts, channels, rows=[])
    expected = torch.cat([logits(model, row) for row in MANY_ROWS[:8]])

    def distance(student):
        got = torch.cat([logits(student, row) for row in MANY_ROWS[:8]])
        return torch.nn.functional.kl_div(
            got.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean"
        )

    assert distance(corrected) < distance(sliced)


def test_heads_and_tying_stay_and_plain_transformers_loads_it(build_model, tmp_path):
    model = build_model("llama", tie_word_embeddings=True, num_attention_heads=4, num_key_value_heads=2)
    narrowed = narrow_stream(take_apart(model), torch.arange(21), ROWS)
    narrowed.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    # 4 heads do not divide 21 channels: Llama's config would refuse it, Mistral's does not.
    assert reloaded.config.model_type == "mistral"
    assert (reloaded.config.head_dim, reloaded.config.num_attention_heads) == (8, 4)
    assert reloaded.get_output_embeddings().weight is reloaded.get_input_embeddings().weight
    torch.testing.assert_close(logits(reloaded), logits(narrowed))
    assert reloaded.generate(ROWS[0].unsqueeze(0), max_new_tokens=3, do_sample=False).shape == (1, 27)


def test_a_llama_whose_heads_divide_the_width_stays_a_llama(build_model):
    assert narrow_stream(take_apart(build_model()), torch.arange(28), ROWS).config.model_type == "llama"


def test_the_teacher_is_left_as_it_was(build_model):
    model = build_model("gemma3_text", tie_word_embeddings=True, **HEADS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parts = take_apart(model)
    narrow_stream(parts, torch.arange(16), ROWS)
    narrow_mlps(parts, [torch.arange(16)] * 4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not has_hooks(model)


@pytest.mark.parametrize("method", ["weights", "activations"])
def test_neurons_without_weights_are_the_least_important(build_model, method):
    model = build_model()
    with torch.no_grad():
        for block in model.model.layers:
            for name in ("gate_proj", "up_proj"):
                block.mlp.get_submodule(name).weight[8:16] = 0.0
    importances = neuron_importances(take_apart(model), ROWS, method=method)
    assert len(importances) == 4
    for of_block in importances:
        assert set(of_block.argsort()[:8].tolist()) == set(range(8, 16))


def test_neurons_by_activations_follow_what_is_written_not_the_size_of_weights(build_model):
    model = build_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 5] = 0.0
    importances = neuron_importances(take_apart(model), ROWS, method="activations")
    assert importances[0].argmin() == 5
    assert neuron_importances(take_apart(model), ROWS, method="weights")[0].argmin() != 5


def test_padding_does_not_count(build_model):
    parts = take_apart(build_model())
    alone = sum(channel_importances(parts, [row]) for row in ROWS)
    torch.testing.assert_close(channel_importances(parts, ROWS), alone, rtol=1e-4, atol=1e-6)
    neurons = neuron_importances(parts, ROWS, method="activations")
    apart = [neuron_importances(parts, [row], method="activations") for row in ROWS]
    for block, together in enumerate(neurons):
        torch.testing.assert_close(together, sum(one[block] ** 2 for one in apart) ** 0.5, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "phi3"])
def test_what_is_not_built_like_llama_is_refused_by_the_name_of_its_weight(build_model, architecture):
    changes = {"num_key_value_heads": 4} if architecture == "phi3" else {}
    parts = take_apart(build_model(architecture, **changes))
    with pytest.raises(ModelError, match=r"cannot be cut in width: what \S+ of shape .* holds is not known"):
        narrow_stream(parts, torch.arange(16), ROWS)


def test_a_width_that_the_architecture_refuses_is_one_line(build_model):
    model = build_model("gemma3_text", **HEADS)
    with pytest.raises(ModelError, match="does not allow hidden_size 21.*multiple of the number of attention heads"):
        narrow_stream(take_apart(model), torch.arange(21), ROWS)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3_text", "olmo2"])
def test_a_scaled_weight_scales_what_the_norm_gives(build_model, architecture):
    norm = take_apart(build_model(architecture, **HEADS)).final_norm
    state = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        norm.weight.add_(torch.linspace(-0.3, 0.3, 32))
        expected = 0.7 * norm(state)
        norm.weight.copy_(scaled_weight(norm, norm.weight, 0.7))
        torch.testing.assert_close(norm(state), expected)


@pytest.mark.parametrize(("share", "size", "kept"), [(0.7, 1536, 1072), (0.5, 48, 24), (0.001, 48, 8)])
def test_neurons_are_kept_in_multiples_of_eight(share, size, kept):
    assert neurons_kept(share, size) == kept
