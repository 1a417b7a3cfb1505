"""Designed students: as many parameters as asked, shaped as asked, with weights from where they should come."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from coldstill.pipeline.models import take_apart
from coldstill.pipeline.models.forward import mean_loss
from coldstill.pipeline.recipe.student import (
    InitConfig,
    PruneConfig,
    PruneHiddenConfig,
    PruneLayersConfig,
    PruneMlpConfig,
)
from coldstill.pipeline.runtime.errors import ModelError, RecipeError
from coldstill.pipeline.students import making
from coldstill.pipeline.students.designs import block_positions, design_student
from coldstill.pipeline.students.making import kept_blocks_before_measuring, num_student_blocks
from coldstill.pipeline.students.pruning_report import JudgedRows

ROWS = [torch.randint(1, 64, (40,), generator=torch.Generator().manual_seed(row)) for row in range(8)]


def make_student(section, teacher, rows):
    judged = JudgedRows(rows, are_calibration=True, teacher_loss=mean_loss(teacher.model, rows))
    return making.make_student(section, teacher, rows, judged)


def design(model, **options):
    return design_student(model.config, **{"parameters": None, "compression": None, "shape": "balanced", **options})


def parameters(model):
    return sum(value.numel() for value in model.parameters())


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text", "olmo2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", ["depth", "width", "balanced"])
def test_a_design_counts_what_the_model_that_is_made_has(build_model, architecture, tied, shape):
    teacher = build_model(architecture, head_dim=8, tie_word_embeddings=tied)
    section = InitConfig(compression=0.7, shape=shape, weights="truncate")
    made = make_student(section, take_apart(teacher), ROWS)
    assert parameters(made.model) == design(teacher, compression=0.7, shape=shape).num_parameters
    assert made.report["parameters"] == {"teacher": parameters(teacher), "student": parameters(made.model)}
    assert num_student_blocks(section, teacher.config) == made.model.config.num_hidden_layers


def test_each_shape_shrinks_what_it_says(build_model):
    teacher = build_model(hidden_size=64, intermediate_size=160, num_hidden_layers=8, vocab_size=64)
    whole = parameters(teacher)
    depth, width, balanced = (design(teacher, compression=0.6, shape=name) for name in ("depth", "width", "balanced"))
    assert (depth.hidden_size, depth.mlp_size, depth.num_blocks) == (64, 160, 5)
    assert width.num_blocks == 8
    assert width.hidden_size < 64
    assert balanced.num_blocks < 8
    assert width.hidden_size < balanced.hidden_size < 64
    for chosen in (width, balanced):
        assert chosen.num_parameters == pytest.approx(0.6 * whole, rel=0.02)
    deeper = design(teacher, compression=0.3, shape="depth")
    assert (deeper.num_blocks, deeper.hidden_size < 64) == (4, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameters": 10**9}, r"wants 1,000,000,000 parameters, but the teacher has \d+,\d+: nothing to shrink"),
        ({"parameters": 100}, r"wants 100 parameters, but the smallest student of this teacher has \d"),
    ],
)
def test_what_cannot_be_designed_is_one_line(build_model, options, message):
    with pytest.raises(RecipeError, match=message):
        design(build_model(), **options)


def test_an_architecture_that_is_not_known_is_refused_before_any_work(build_model):
    with pytest.raises(ModelError, match="GPT2LMHeadModel cannot be cut in width"):
        design(build_model("gpt2"), compression=0.5)


def test_copied_weights_are_those_of_evenly_spaced_blocks(build_model):
    teacher = build_model(num_hidden_layers=7, vocab_size=64)
    section = InitConfig(compression=0.6, shape="depth", weights="copy", reconstruct=False)
    made = make_student(section, take_apart(teacher), ROWS)
    kept = made.model.config.kept_blocks
    assert kept == [0, 2, 4, 6]
    assert kept_blocks_before_measuring(section, teacher.config) == kept
    for block, source in enumerate(kept):
        ours, theirs = made.model.model.layers[block], teacher.model.layers[source]
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_truncated_weights_are_the_leading_ones(build_model):
    teacher = build_model(tie_word_embeddings=False)
    made = make_student(
        InitConfig(compression=0.6, shape="balanced", weights="truncate", reconstruct=False), take_apart(teacher), ROWS
    )
    config = made.model.config
    channels, neurons = config.hidden_size, config.intermediate_size
    ours, theirs = made.model.model.layers[0].mlp, teacher.model.layers[0].mlp
    assert torch.equal(ours.gate_proj.weight, theirs.gate_proj.weight[:neurons, :channels])
    assert config.kept_blocks == list(range(config.num_hidden_layers))


def test_interpolated_weights_lie_between_the_teachers(build_model):
    teacher = build_model(num_hidden_layers=6, vocab_size=64)
    section = InitConfig(compression=0.68, shape="depth", weights="interpolate", reconstruct=False)
    made = make_student(section, take_apart(teacher), ROWS)
    assert made.model.config.num_hidden_layers == 4
    assert not hasattr(made.model.config, "kept_blocks")
    ours, theirs = made.model.model.layers, [layer.mlp.up_proj.weight for layer in teacher.model.layers]
    # Blocks 0 to 3 lie at 0, 5/3, 10/3 and 5.
    torch.testing.assert_close(ours[3].mlp.up_proj.weight, theirs[5])
    torch.testing.assert_close(ours[1].mlp.up_proj.weight, torch.lerp(theirs[1], theirs[2], 2 / 3))
    narrow = make_student(
        InitConfig(compression=0.6, shape="width", weights="interpolate", reconstruct=False), take_apart(teacher), ROWS
    )
    ours, theirs = narrow.model.model.embed_tokens.weight, teacher.model.embed_tokens.weight
    torch.testing.assert_close(ours[:, 0], theirs[:, 0])
    torch.testing.assert_close(ours[:, -1], theirs[:, -1])
    size = narrow.model.config.hidden_size
    position = 31 / (size - 1)
    expected = torch.lerp(theirs[:, int(position)], theirs[:, int(position) + 1], position - int(position))
    torch.testing.assert_close(ours[:, 1], expected)


def test_blocks_lie_evenly_from_first_to_last():
    assert block_positions(30, 26)[0] == 0
    assert block_positions(30, 26)[-1] == 29
    assert block_positions(5, 1) == [0.0]


def test_depth_and_both_widths_are_cut_together_and_reported(build_model, tmp_path):
    teacher = build_model("llama", tie_word_embeddings=True)
    section = PruneConfig(
        layers=PruneLayersConfig(method="explicit", blocks=[1]),
        mlp=PruneMlpConfig(keep=0.5),
        hidden=PruneHiddenConfig(size=22),
    )
    made = make_student(section, take_apart(teacher), ROWS)
    report = made.report
    assert report["kind"] == "depth_and_width"
    assert report["blocks"] == {"teacher": 4, "student": 3, "kept": [0, 2, 3]}
    assert report["mlp"] == {"teacher": 48, "student": 24}
    assert report["hidden"] == {"teacher": 32, "student": 22}
    with torch.no_grad():
        batch = torch.stack(ROWS)
        for name, model in (("teacher", teacher), ("student", made.model)):
            loss = model(input_ids=batch, labels=batch).loss.item()
            assert report["judged"]["loss"][name] == pytest.approx(loss, rel=1e-4)
    made.model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reloaded.generate(ROWS[0][:4].unsqueeze(0), max_new_tokens=3, do_sample=False).shape == (1, 7)
