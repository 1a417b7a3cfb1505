"""Reconstructing students: what need not be lost comes back, what was not lost stays, and nothing is done by halves."""

import copy

import pytest
import torch
from hooks import has_hooks

from coldstill.pipeline.models import take_apart
from coldstill.pipeline.models.forward import block_outputs, mean_loss, padded_batches
from coldstill.pipeline.recipe.student import (
    InitConfig,
    PruneConfig,
    PruneHiddenConfig,
    PruneLayersConfig,
    PruneMlpConfig,
)
from coldstill.pipeline.runtime.errors import ModelError
from coldstill.pipeline.students import writer_fit
from coldstill.pipeline.students.axes import WRITERS
from coldstill.pipeline.students.depth import cut_blocks
from coldstill.pipeline.students.making import make_student
from coldstill.pipeline.students.pruning_report import JudgedRows
from coldstill.pipeline.students.reconstruction import reconstruct, why_no_reconstruction
from coldstill.pipeline.students.under_way import Channels, Span
from coldstill.pipeline.students.width import channel_importances, most_important, narrow_mlps, narrow_stream

LINEAR = ["llama", "mistral", "qwen2", "qwen3", "smollm3"]
NORMS_BEHIND = ["gemma2", "gemma3_text", "olmo2"]
METHODS = ["linear", "blocks"]
ROWS = [torch.randint(1, 384, (40,), generator=torch.Generator().manual_seed(row)) for row in range(24)]
JUDGED = JudgedRows(ROWS, are_calibration=True, teacher_loss=1.0)
NOT_AS_IT_IS = "its block 0 does not add what self_attn.o_proj and mlp.down_proj write to its input as it is"


def fitted(student, original, kept_blocks, *, method, channels_K=None, rows=ROWS):
    """Reconstruct a student that has some of the original's blocks and channels."""
    spans = Span.between(list(kept_blocks), len(original.blocks))
    return reconstruct(
        student,
        original,
        rows,
        stands_for=spans,
        channels=Channels.kept(channels_K),
        method=method,
        show_progress=False,
    )


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def stream_errors(student, original, kept_blocks, channels):
    """The student's stream in front of each block but the first, and behind the last, against the original's."""
    ends = [*(block - 1 for block in kept_blocks[1:]), len(original.blocks) - 1]
    errors, num_positions = torch.zeros(len(kept_blocks)), 0
    with torch.no_grad():
        for ids_BT, mask_BT in padded_batches(ROWS, original.model):
            with block_outputs(student.blocks, range(len(student.blocks))) as got:
                student.body(input_ids=ids_BT)
            with block_outputs(original.blocks, ends) as want:
                original.body(input_ids=ids_BT)
            num_positions += int(mask_BT.sum())
            for index, end in enumerate(ends):
                wanted = want[end]
                error = (got[index] - wanted[..., channels]).square().mean(dim=-1)
                errors[index] += (error / wanted.square().mean(dim=-1)).sum()
    return errors / num_positions


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", LINEAR)
def test_every_block_of_a_reconstructed_student_comes_nearer_to_the_teachers_stream(build_model, architecture, method):
    original = take_apart(build_model(architecture, head_dim=8))
    kept = [0, 2, 3]
    parts = take_apart(cut_blocks(original, kept))
    parts = take_apart(narrow_mlps(parts, [torch.arange(32)] * 3))
    channels = most_important(channel_importances(parts, ROWS), 28)
    student = take_apart(narrow_stream(parts, channels, ROWS))
    before = stream_errors(student, original, kept, channels)
    said = fitted(student, original, kept, method=method, channels_K=channels)
    after = stream_errors(student, original, kept, channels)
    assert (after < before).all()
    assert after[-1] < 0.5 * before[-1]
    torch.testing.assert_close(torch.tensor(said), after)


@pytest.mark.parametrize("architecture", [*LINEAR, *NORMS_BEHIND, "gpt2"])
def test_training_a_block_goes_on_where_least_squares_end_and_needs_none(build_model, architecture):
    original = take_apart(build_model(architecture))
    kept, everything = [0, 3], torch.arange(original.hidden_size)
    plain = stream_errors(take_apart(cut_blocks(original, kept)), original, kept, everything)
    errors = {"plain": float(plain[-1])}
    for method in METHODS if architecture in LINEAR else ["blocks"]:
        student = take_apart(cut_blocks(original, kept))
        errors[method] = fitted(student, original, kept, method=method)[-1]
    assert errors["blocks"] < 0.98 * errors.get("linear", errors["plain"])


@pytest.mark.parametrize("architecture", LINEAR)
def test_neurons_that_others_repeat_go_without_a_trace(build_model, architecture, monkeypatch):
    monkeypatch.setattr(writer_fit, "RIDGE", 1e-7)
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
        fitted(student, original, range(4), method="linear")
        assert (student.model(input_ids=batch).logits - expected).abs().max() < 1e-3 * expected.abs().max()


def test_a_student_that_lost_nothing_stays_as_it_is_with_its_biases(build_model):
    model = build_model("llama", attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_(generator=torch.Generator().manual_seed(len(name)))
    original, student = take_apart(model), take_apart(copy.deepcopy(model))
    fitted(student, original, range(4), method="linear")
    for name, value in weights(model).items():
        torch.testing.assert_close(student.model.state_dict()[name], value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_only_what_is_fitted_changes_and_the_teacher_does_not(build_model, method):
    model = build_model("llama")
    teacher = weights(model)
    original = take_apart(model)
    student = take_apart(cut_blocks(original, [0, 3]))
    student.model.requires_grad_(False)
    cut = weights(student.model)
    fitted(student, original, [0, 3], method=method)
    changed = {name for name, value in weights(student.model).items() if not torch.equal(value, cut[name])}
    of_blocks = {name for name in cut if name.startswith("model.layers.")}
    writers = {f"model.layers.{block}.{name}.weight" for block in (0, 1) for name in WRITERS}
    assert changed == (writers if method == "linear" else of_blocks)
    assert all(torch.equal(value, teacher[name]) for name, value in model.state_dict().items())
    assert not has_hooks(model, student.model)
    assert all(value.grad is None and not value.requires_grad for value in student.model.parameters())
    assert all(value.requires_grad for value in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_blocks_in_front_of_the_first_cut_stay_as_they_are(build_model, method):
    original = take_apart(build_model("llama"))
    student = take_apart(cut_blocks(original, [0, 1, 3]))
    cut = weights(student.blocks)
    errors = fitted(student, original, [0, 1, 3], method=method)
    changed = {name[0] for name, value in weights(student.blocks).items() if not torch.equal(value, cut[name])}
    assert changed == {"1", "2"}
    assert errors[0] < 1e-10 < errors[1]


@pytest.mark.parametrize("method", METHODS)
def test_a_student_in_bfloat16_is_fitted_in_float32_and_stays_in_bfloat16(build_model, method):
    model = build_model("llama")
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        original = take_apart(copy.deepcopy(model).to(dtype))
        student = take_apart(cut_blocks(original, [0, 3]))
        errors[dtype] = fitted(student, original, [0, 3], method=method)[-1]
        assert {value.dtype for value in student.model.parameters()} == {dtype}
    assert errors[torch.bfloat16] == pytest.approx(errors[torch.float32], rel=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_padding_does_not_count(build_model, monkeypatch, method):
    original = take_apart(build_model("llama"))
    rows = [row[: 12 + 3 * place] for place, row in enumerate(ROWS[:8])]
    made = []
    for padding in (0, 7):
        student = take_apart(cut_blocks(original, [0, 2]))
        monkeypatch.setattr("coldstill.pipeline.students.under_way.padded_batches", padded_further(padding))
        fitted(student, original, [0, 2], method=method, rows=rows)
        made.append(weights(student.model))
    for name, value in made[0].items():
        torch.testing.assert_close(made[1][name], value, atol=1e-4, rtol=1e-4)


def padded_further(padding):
    """Lay rows side by side with more padding behind them."""

    def batches(rows, model):
        for ids_BT, mask_BT in padded_batches(rows, model):
            yield tuple(torch.nn.functional.pad(part, (0, padding)) for part in (ids_BT, mask_BT))

    return batches


@pytest.mark.parametrize(
    ("architecture", "why"),
    [*((architecture, NOT_AS_IT_IS) for architecture in NORMS_BEHIND), ("gpt2", "its block 0 has no self_attn.o_proj")],
)
def test_what_least_squares_cannot_do_is_refused_with_its_reason_and_done_block_by_block(
    build_model, architecture, why
):
    original = take_apart(build_model(architecture))
    assert why_no_reconstruction(original, ROWS[0], "linear") == why
    assert why_no_reconstruction(original, ROWS[0], "blocks") is None
    layers = PruneLayersConfig(remove=1, method="last")
    made = make_student(PruneConfig(layers=layers), original, ROWS, JUDGED)
    assert made.report["reconstructed"] == "blocks"
    with pytest.raises(ModelError, match="student.prune.reconstruct is linear, but") as raised:
        make_student(PruneConfig(layers=layers, reconstruct="linear"), original, ROWS, JUDGED)
    assert str(raised.value).endswith(f"cannot be reconstructed so: {why}; set it to auto or false")


@pytest.mark.parametrize("architecture", LINEAR)
def test_what_is_built_plainly_can_be_reconstructed_in_bfloat16_too(build_model, architecture):
    original = take_apart(build_model(architecture).bfloat16())
    assert [why_no_reconstruction(original, ROWS[0], method) for method in METHODS] == [None, None]


def test_a_student_is_reconstructed_as_its_recipe_says_and_of_itself_by_training_blocks(build_model):
    original = take_apart(build_model("llama"))
    layers, mlp, hidden = PruneLayersConfig(remove=1), PruneMlpConfig(keep=0.5), PruneHiddenConfig(size=24)
    for section, expected in (
        (PruneConfig(layers=layers), "blocks"),
        (PruneConfig(layers=layers, reconstruct=True), "linear"),
        (PruneConfig(mlp=mlp, reconstruct="linear"), "linear"),
        (PruneConfig(hidden=hidden, reconstruct="blocks"), "blocks"),
        (PruneConfig(layers=layers, mlp=mlp, hidden=hidden), "blocks"),
        (PruneConfig(layers=layers, mlp=mlp, hidden=hidden, reconstruct=False), False),
    ):
        made = make_student(section, original, ROWS, JUDGED)
        assert made.report["reconstructed"] == expected
        assert ("stream_errors" in made.report) is bool(expected)
        plain = make_student(section.model_copy(update={"reconstruct": False}), original, ROWS, JUDGED)
        assert (mean_loss(made.model, ROWS) == mean_loss(plain.model, ROWS)) is (expected is False)


@pytest.mark.parametrize("weights_from", ["copy", "truncate", "interpolate"])
def test_a_designed_student_is_reconstructed_from_whatever_weights_it_begins(build_model, weights_from):
    original = take_apart(build_model("llama"))
    kwargs = {"compression": 0.6, "weights": weights_from}
    plain = make_student(InitConfig(**kwargs, reconstruct=False), original, ROWS, JUDGED)
    made = make_student(InitConfig(**kwargs), original, ROWS, JUDGED)
    assert made.report["reconstructed"] == "blocks"
    assert plain.report["reconstructed"] is False
    assert mean_loss(made.model, ROWS) != mean_loss(plain.model, ROWS)
