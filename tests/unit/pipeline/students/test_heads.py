"""Cutting attention heads: whole groups go, the others do what they did, and plain transformers runs what stays."""

import pytest
import torch
from hooks import has_hooks
from transformers import AutoModelForCausalLM

from coldstill.pipeline.models import take_apart
from coldstill.pipeline.runtime.errors import ModelError
from coldstill.pipeline.students.heads import group_importances, groups_kept, narrow_heads
from coldstill.pipeline.students.reconstruction import reconstruct
from coldstill.pipeline.students.under_way import Channels, Span
from coldstill.pipeline.students.width import narrow_stream

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
# Of these the config says how wide a head is; of the others it follows from the width, and must not when heads go.
OWN_WIDTH = {"qwen3": {"head_dim": 8}, "gemma2": {"head_dim": 8}, "gemma3_text": {"head_dim": 8}}
WITH_HEADS = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3"]
ROWS = [torch.randint(1, 384, (length,), generator=torch.Generator().manual_seed(length)) for length in (24, 17, 30)]
MANY_ROWS = [torch.randint(1, 384, (40,), generator=torch.Generator().manual_seed(row)) for row in range(24)]


def logits(model, row=ROWS[0]):
    with torch.no_grad():
        return model(input_ids=row.unsqueeze(0)).logits[0]


def silence(model, block, group):
    """Let the two query heads of a key-value head write nothing to the stream."""
    with torch.no_grad():
        model.model.layers[block].self_attn.o_proj.weight.chunk(4, dim=1)[group].zero_()


@pytest.mark.parametrize("architecture", WITH_HEADS)
def test_groups_that_write_nothing_go_without_a_trace(build_model, architecture, tmp_path):
    model = build_model(architecture, attention_bias=True, **HEADS, **OWN_WIDTH.get(architecture, {}))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_(generator=torch.Generator().manual_seed(len(name)))
    kept = [[0, 1], [1, 3], [0, 2], [2, 3]]
    for block, of_block in enumerate(kept):
        for group in set(range(4)) - set(of_block):
            silence(model, block, group)
    expected = logits(model)
    importances = group_importances(take_apart(model), ROWS)
    assert [of_block.sort(descending=True).indices[:2].sort().values.tolist() for of_block in importances] == kept
    narrow_heads(take_apart(model), [torch.tensor(of_block) for of_block in kept]).save_pretrained(tmp_path)
    student = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(student), expected, atol=2e-4, rtol=1e-4)
    config = student.config
    head_dim = 8 if architecture in OWN_WIDTH else 4
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, head_dim)
    assert student.model.layers[0].self_attn.k_proj.weight.shape == (2 * head_dim, 32)
    assert student.generate(ROWS[0].unsqueeze(0), max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 27)


def test_a_llama_whose_heads_no_longer_divide_its_width_becomes_a_mistral_that_says_the_same(build_model, tmp_path):
    model = build_model("llama", **HEADS)
    for block in range(4):
        silence(model, block, 1)
    expected = logits(model)
    narrow_heads(take_apart(model), [torch.tensor([0, 2, 3])] * 4).save_pretrained(tmp_path)
    student = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert student.config.model_type == "mistral"
    torch.testing.assert_close(logits(student), expected, atol=2e-4, rtol=1e-4)


def test_a_group_weighs_what_it_writes_not_what_its_heads_hold(build_model):
    model = build_model("llama", **HEADS)
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        # What the second head of group 2 adds is what the first one took: large values that write nothing.
        attention.o_proj.weight[:, 16:20] *= 30.0
        attention.o_proj.weight[:, 20:24] = -attention.o_proj.weight[:, 16:20]
        attention.q_proj.weight[20:24] = attention.q_proj.weight[16:20]
    assert group_importances(take_apart(model), ROWS)[1].argmin() == 2
    assert not has_hooks(model)


def test_padding_does_not_count(build_model):
    parts = take_apart(build_model("llama", **HEADS))
    together = group_importances(parts, ROWS)
    apart = [group_importances(parts, [row]) for row in ROWS]
    for block, of_block in enumerate(together):
        torch.testing.assert_close(of_block, sum(one[block] ** 2 for one in apart) ** 0.5, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_what_the_heads_that_stay_write_is_fitted_to_what_all_wrote(build_model, architecture):
    original = take_apart(build_model(architecture, **HEADS, **OWN_WIDTH.get(architecture, {})))
    teacher = {name: value.clone() for name, value in original.model.state_dict().items()}
    groups = [of_block.argsort()[1:].sort().values for of_block in group_importances(original, MANY_ROWS)]
    student = take_apart(narrow_heads(original, groups))
    student = take_apart(narrow_stream(student, torch.arange(28), MANY_ROWS))

    def distance():
        differences = [
            torch.nn.functional.kl_div(
                logits(student.model, row).log_softmax(-1),
                logits(original.model, row).log_softmax(-1),
                log_target=True,
                reduction="batchmean",
            )
            for row in MANY_ROWS
        ]
        return torch.stack(differences).mean()

    before = distance()
    reconstruct(
        student,
        original,
        MANY_ROWS,
        stands_for=Span.between(range(4), 4),
        channels=Channels.kept(torch.arange(28)),
        method="linear",
        show_progress=False,
    )
    assert distance() < 0.8 * before
    assert all(torch.equal(value, teacher[name]) for name, value in original.model.state_dict().items())


@pytest.mark.parametrize(
    ("architecture", "changes", "why"),
    [
        ("gpt2", {}, "what \\S+ of shape .* holds is not known"),
        (
            "olmo2",
            {},
            "the heads of Olmo2ForCausalLM are not cut: \\S+q_norm.weight norms all of a block's heads together",
        ),
        ("gemma3_text", {"num_attention_heads": 8, "num_key_value_heads": 4}, "does not allow num_attention_heads 6"),
    ],
)
def test_heads_that_cannot_go_are_refused_in_one_line(build_model, architecture, changes, why):
    parts = take_apart(build_model(architecture, **{"head_dim": 8, **changes}))
    with pytest.raises(ModelError, match=why) as refused:
        narrow_heads(parts, [torch.arange(3)] * 4)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("share", "groups", "kept"), [(0.67, 3, 2), (0.5, 8, 4), (0.1, 4, 1), (0.9, 2, 2)])
def test_a_share_is_the_nearest_number_of_groups_and_never_none(share, groups, kept):
    assert groups_kept(share, groups) == kept
