"""Reconstructing students: what need not be lost comes back, what was not lost stays, and nothing is done by halves."""

import copy

import pytest
import torch
from hooks import has_hooks

from coldstill.pipeline.models import take_apart
from coldstill.pipeline.models.forward import block_outputs, mean_loss, padded_batches
from coldstill.pipeline.recipe.student import PruneConfig, PruneHiddenConfig, PruneLayersConfig, PruneMlpConfig
from coldstill.pipeline.runtime.errors import ModelError
from coldstill.pipeline.students import reconstruction
from coldstill.pipeline.students.depth import cut_blocks
from coldstill.pipeline.students.making import make_student
from coldstill.pipeline.students.pruning_report import JudgedRows
from coldstill.pipeline.students.reconstruction import reconstruct, why_no_reconstruction
from coldstill.pipeline.students.width import channel_importances, most_important, narrow_mlps, narrow_stream

ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3", "smollm3"]
ROWS = [torch.randint(1, 384, (40,), generator=torch.Generator().manual_seed(row)) for row in range(24)]
ALL = torch.arange(32)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def stream_errors(student, original, kept_blocks, channels):
    """The student's stream in front of each block but the first, and behind the last, against the original's."""
    ends = [*(block - 1 for block in kept_blocks[1:]), len(original.blocks) - 1]
    errors = torch.zeros(len(kept_blocks))
    with torch.no_grad():
        for ids_BT, _ in padded_batches(ROWS, original.model):
            with block_outputs(student.blocks, range(len(student.blocks))) as got:
                student.body(input_ids=ids_BT)
            with block_outputs(original.blocks, ends) as want:
                original.body(input_ids=ids_BT)
            for index, end in enumerate(ends):
                wanted = want[end]
                error = (got[index] - wanted[..., channels]).square().sum(dim=-1)
                errors[index] += (error / wanted.square().mean(dim=-1)).sum()
    return errors


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_block_of_a_reconstructed_student_comes_nearer_to_the_teachers_stream(build_model, architecture):
    original = take_apart(build_model(architecture, head_dim=8))
    kept = [0, 2, 3]
    parts = take_apart(cut_blocks(original, kept))
    parts = take_apart(narrow_mlps(parts, [torch.arange(32)] * 3))
    channels = most_important(channel_importances(parts, ROWS), 28)
    student = take_apart(narrow_stream(parts, channels, ROWS))
    before = stream_errors(student, original, kept, channels)
    reconstruct(student, original, ROWS, kept_blocks=kept, channels_K=channels)
    after = stream_errors(student, original, kept, channels)
    assert (after < before).all()
    assert after[-1] < 0.5 * before[-1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_neurons_that_others_repeat_go_without_a_trace(build_model, architecture, monkeypatch):
    monkeypatch.setattr(reconstruction, "RIDGE", 1e-7)
    model = build_model(architecture, head_dim=8)
    with torch.no_grad():
        for layer in take_apart(model).blocks:
            for name in ("gate_proj", "up_proj"):
                weight = layer.get_submodule(f"mlp.{name}").weight
                weight[40:] = weight[:8]
    original = take_apart(model)
    student = take_apart(narrow_mlps(original, [torch.arange(40)] * 4))
    batch = torch.stack(ROWS)
    with torch.no_grad():
        expected = model(input_ids=batch).logits
        assert (student.model(input_ids=batch).logits - expected).abs().max() > 0.1 * expected.abs().max()
        reconstruct(student, original, ROWS, kept_blocks=range(4), channels_K=ALL)
        assert (student.model(input_ids=batch).logits - expected).abs().max() < 1e-3 * expected.abs().max()


def test_a_student_that_lost_nothing_stays_as_it_is_with_its_biases(build_model):
    model = build_model("llama", attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_(generator=torch.Generator().manual_seed(len(name)))
    original, student = take_apart(model), take_apart(copy.deepcopy(model))
    reconstruct(student, original, ROWS, kept_blocks=range(4), channels_K=ALL)
    for name, value in weights(model).items():
        torch.testing.assert_close(student.model.state_dict()[name], value, atol=1e-4, rtol=1e-4)


def test_only_what_writes_to_the_stream_changes_and_the_teacher_does_not(build_model):
    model = build_model("llama")
    teacher = weights(model)
    original = take_apart(model)
    student = take_apart(cut_blocks(original, [0, 3]))
    cut = weights(student.model)
    reconstruct(student, original, ROWS, kept_blocks=[0, 3], channels_K=ALL)
    changed = {name for name, value in weights(student.model).items() if not torch.equal(value, cut[name])}
    expected = {f"model.layers.{block}.{name}.weight" for block in (0, 1) for name in reconstruction.WRITERS}
    assert changed == expected
    assert all(torch.equal(value, teacher[name]) for name, value in model.state_dict().items())
    assert not has_hooks(model, student.model)


def test_padding_does_not_count(build_model, monkeypatch):
    original = take_apart(build_model("llama"))
    rows = [row[: 12 + 3 * place] for place, row in enumerate(ROWS[:8])]
    made = []
    for size in (8, 1):
        monkeypatch.setattr("coldstill.pipeline.models.forward.BATCH_ROWS", size)
        student = take_apart(cut_blocks(original, [0, 2]))
        reconstruct(student, original, rows, kept_blocks=[0, 2], channels_K=ALL)
        made.append(weights(student.model))
    for name, value in made[0].items():
        torch.testing.assert_close(made[1][name], value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "why"),
    [
        ("gemma2", "its block 0 does not add what self_attn.o_proj and mlp.down_proj write to its input as it is"),
        ("gemma3_text", "its block 0 does not add what self_attn.o_proj and mlp.down_proj write to its input as it is"),
        ("olmo2", "its block 0 does not add what self_attn.o_proj and mlp.down_proj write to its input as it is"),
        ("gpt2", "its block 0 has no self_attn.o_proj"),
    ],
)
def test_what_cannot_be_reconstructed_is_left_or_refused_with_its_reason(build_model, architecture, why):
    original = take_apart(build_model(architecture))
    assert why_no_reconstruction(original, ROWS[0]) == why
    layers = PruneLayersConfig(remove=1, method="last")
    judged = JudgedRows(ROWS, are_calibration=True, teacher_loss=1.0)
    plain = make_student(PruneConfig(layers=layers), original, ROWS, judged)
    assert plain.report["reconstructed"] is False
    with pytest.raises(ModelError, match="student.prune.reconstruct is true, but") as raised:
        make_student(PruneConfig(layers=layers, reconstruct=True), original, ROWS, judged)
    assert str(raised.value).endswith(f"cannot be reconstructed: {why}; set it to auto or false")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_built_plainly_can_be_reconstructed_in_bfloat16_too(build_model, architecture):
    assert why_no_reconstruction(take_apart(build_model(architecture).bfloat16()), ROWS[0]) is None


def test_width_is_reconstructed_of_itself_and_depth_when_asked(build_model):
    original = take_apart(build_model("llama"))
    layers, mlp, hidden = PruneLayersConfig(remove=1), PruneMlpConfig(keep=0.5), PruneHiddenConfig(size=24)
    judged = JudgedRows(ROWS, are_calibration=True, teacher_loss=1.0)
    for section, expected in (
        (PruneConfig(layers=layers), False),
        (PruneConfig(layers=layers, reconstruct=True), True),
        (PruneConfig(mlp=mlp), True),
        (PruneConfig(hidden=hidden), True),
        (PruneConfig(layers=layers, mlp=mlp, hidden=hidden), True),
        (PruneConfig(layers=layers, mlp=mlp, hidden=hidden, reconstruct=False), False),
    ):
        made = make_student(section, original, ROWS, judged)
        assert made.report["reconstructed"] is expected
        plain = make_student(section.model_copy(update={"reconstruct": False}), original, ROWS, judged)
        is_same = mean_loss(made.model, ROWS) == mean_loss(plain.model, ROWS)
        assert is_same is not expected
