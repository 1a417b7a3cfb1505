"""Every way of making a student, through both stages: what is exported is a plain transformers model that speaks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from coldstill.cache.reader import Reader
from coldstill.pipeline.outputs.run_index import find_run_rows
from coldstill.pipeline.recipe.file import load_recipe

STUDENTS: dict[str, dict[str, Any]] = {
    "depth": {"prune": {"layers": {"remove": 1, "method": "importance"}}},
    "depth-by-kl": {"prune": {"layers": {"remove": 2, "method": "kl"}}},
    "depth-reconstructed": {"prune": {"layers": {"remove": 1, "method": "importance"}, "reconstruct": True}},
    "mlp": {"prune": {"mlp": {"keep": 0.6}}},
    "mlp-by-weights": {"prune": {"mlp": {"size": 32, "method": "weights"}}},
    "heads": {"prune": {"heads": {"keep": 0.5}}},
    "heads-and-hidden": {"prune": {"heads": {"size": 1}, "hidden": {"size": 22}}},
    "hidden": {"prune": {"hidden": {"size": 22}}},
    "depth-and-width": {
        "prune": {"layers": {"remove": 1, "method": "last"}, "mlp": {"keep": 0.6}, "hidden": {"size": 24}}
    },
    "designed": {"init": {"compression": 0.6, "shape": "balanced"}},
}


@pytest.mark.parametrize("kind", STUDENTS)
def test_every_kind_of_student_is_made_trained_judged_and_loaded(
    kind: str, coldstill: Callable[..., Any], write_recipe: Callable[..., Path], workplace: Path
):
    recipe = write_recipe(student=STUDENTS[kind], train__max_steps=2)
    made = json.loads(coldstill("precompute", recipe, "--json").stdout)
    coldstill("train", recipe)
    models = json.loads(coldstill("evaluate", recipe, "--json").stdout)["models"]
    assert models["recovered"]["loss"] != models["pruned"]["loss"]
    for folder in (made["students"][0], workplace / "run" / "student"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        ids = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert ids.shape == (1, 7)


def test_prune_says_what_was_cut_and_what_it_cost(coldstill: Callable[..., Any], write_recipe: Callable[..., Path]):
    recipe = write_recipe(student=STUDENTS["depth-and-width"])
    lines = coldstill("prune", recipe).stdout.splitlines()
    assert lines[1].startswith("parameters ")
    assert "blocks     3 of 4, without 3" in lines
    assert "mlp        32 of 48 neurons a block" in lines
    assert "hidden     24 of 32 channels" in lines
    assert lines[-1].startswith("perplexity ")
    assert lines[-1].endswith("on 92 tokens of train rows behind the calibration rows")
    assert "fitted     each block, by gradient, to the teacher's residual stream (reconstruct: blocks)" in lines
    assert coldstill("prune", recipe).stdout.splitlines()[0].endswith("(there already)")


def test_prune_by_kl_says_what_each_cut_costs_and_what_the_next_ones_would_have(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path]
):
    recipe = write_recipe(student=STUDENTS["depth-by-kl"])
    lines = coldstill("prune", recipe).stdout.splitlines()
    report = json.loads(coldstill("prune", recipe, "--json").stdout)["report"]
    first, second = report["cut_costs"]
    assert set(first["kl"]) == {"0", "1", "2", "3"}
    assert sorted({0, 1, 2, 3} - {first["removed"], second["removed"]}) == report["blocks"]["kept"]
    cost = first["kl"][str(first["removed"])]
    assert cost == min(first["kl"].values())
    (line,) = [line for line in lines if line.startswith("cut 1 ")]
    assert f"block {first['removed']}, for KL {cost:.3f} to the teacher; next " in line
    assert len([line for line in lines if line.startswith("cut ")]) == 2


def test_a_student_is_judged_on_rows_that_it_was_not_fitted_to_where_there_are_some(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path]
):
    recipe = write_recipe(student={"prune": {"mlp": {"keep": 0.5}, "calibration_rows": 14}})
    made = json.loads(coldstill("prune", recipe, "--json").stdout)
    model = AutoModelForCausalLM.from_pretrained(made["folder"])
    reader = Reader(*train_rows(coldstill, recipe), ["tokens"])
    batch = torch.tensor([reader.row(index)["tokens"]["ids"].tolist() for index in range(14, 18)])
    with torch.no_grad():
        loss = model(input_ids=batch, labels=batch).loss.item()
    judged = made["report"]["judged"]
    assert judged["loss"]["student"] == pytest.approx(loss, abs=2e-4)
    assert (judged["num_tokens"], judged["are_calibration"]) == (4 * 23, False)
    line = coldstill("prune", write_recipe(student__prune__calibration_rows=20)).stdout.splitlines()[-1]
    assert line.endswith("on 92 tokens of the calibration rows")


def train_rows(coldstill: Callable[..., Any], recipe: Path) -> tuple[Any, Any]:
    coldstill("precompute", recipe)
    run = find_run_rows(load_recipe(recipe))
    return run.store, run.selections["train"]


def test_students_that_differ_in_any_cut_are_kept_apart_and_a_dry_run_knows_them(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path], workplace: Path
):
    changes: list[dict[str, Any]] = [
        {"student": {"prune": {"mlp": {"keep": 0.6}}}},
        {"student": {"prune": {"mlp": {"keep": 0.5}}}},
        {"student": {"prune": {"mlp": {"keep": 0.6, "method": "weights"}, "reconstruct": False}}},
        {"student": {"prune": {"mlp": {"keep": 0.6, "method": "weights"}}}},
        {"student": {"prune": {"heads": {"size": 1}}}},
        {"student": {"prune": {"layers": {"remove": 1, "method": "last"}}}},
        {"student": {"prune": {"layers": {"remove": 1, "method": "last"}, "reconstruct": True}}},
        {"student": {"prune": {"layers": {"remove": 1, "method": "last"}, "reconstruct": False}}},
        {"student": {"prune": {"mlp": {"keep": 0.6}, "calibration_rows": 4}}},
    ]
    for change in changes:
        planned = json.loads(coldstill("precompute", write_recipe(**change), "--dry-run", "--json").stdout)
        assert planned["students_to_prune"] == 1
        coldstill("prune", write_recipe(**change))
    assert len(list((workplace / "caches" / "students").glob("[!.]*"))) == len(changes)
    recipe = write_recipe(**changes[2], student__prune__calibration_rows=4)
    coldstill("prune", recipe)  # weights read no rows, so other rows make no other student
    coldstill("prune", write_recipe(**changes[6], student__prune__reconstruct="linear"))  # which is what true means
    assert len(list((workplace / "caches" / "students").glob("[!.]*"))) == len(changes)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"prune": {}}, "student.prune in {recipe}: prune needs layers, heads, mlp or hidden: what is to be cut"),
        (
            {"prune": {"mlp": {"keep": 0.5, "size": 8}}},
            "mlp takes either keep, the share of neurons that stay, or size",
        ),
        ({"prune": {"mlp": {"size": 48}}}, "student.prune.mlp keeps 48 neurons, but the teacher has 48: nothing would"),
        (
            {"prune": {"heads": {"keep": 0.8}}},
            "student.prune.heads keeps 2 key-value heads, but the teacher has 2: nothing would be cut",
        ),
        ({"prune": {"heads": {}}}, "heads takes either keep, the share of key-value heads that stay, or size, their"),
        (
            {"prune": {"hidden": {"size": 64}}},
            "student.prune.hidden keeps 64 channels, but the teacher has 32: nothing",
        ),
        (
            {"prune": {"layers": {"remove": 1}, "reconstruct": "maybe"}},
            "student.prune.reconstruct in {recipe}: takes auto, linear, blocks or false, got 'maybe'",
        ),
        ({"init": {"shape": "width"}}, "init takes either parameters, how many the student has, or compression"),
        ({"init": {"parameters": 9}}, "student.init wants 9 parameters, but the smallest student of this teacher has"),
        ({}, "student takes exactly one of path, a model that is there, prune, how to cut one, and init"),
    ],
)
def test_what_cannot_be_made_is_one_line(
    student: dict[str, Any], message: str, coldstill: Callable[..., Any], write_recipe: Callable[..., Path]
):
    recipe = write_recipe(student=student)
    for command in ("prune", "precompute"):
        error = coldstill(command, recipe, expect=2).stderr.strip()
        assert message.format(recipe=recipe) in error
        assert len(error.splitlines()) == 1


CHANNELS = {
    "pruned": {"prune": {"hidden": {"size": 22}, "calibration_rows": 2}},
    "designed": {"init": {"compression": 0.6, "shape": "width", "weights": "truncate"}},
}


@pytest.mark.parametrize("kind", CHANNELS)
def test_the_channels_that_a_narrow_student_kept_stand_beside_its_config_and_not_in_it(
    kind: str, coldstill: Callable[..., Any], write_recipe: Callable[..., Path], workplace: Path
):
    recipe = write_recipe(student=CHANNELS[kind], train__max_steps=1, loss__gamma=0)
    made = Path(json.loads(coldstill("precompute", recipe, "--json").stdout)["students"][0])
    coldstill("train", recipe)
    for folder in (made, workplace / "run" / "student"):
        config = json.loads((folder / "config.json").read_text())
        channels = json.loads((folder / "kept_channels.json").read_text())
        assert not any("channels" in key for key in config)
        assert len(channels) == len(set(channels)) == config["hidden_size"] < 32
        assert channels == sorted(channels)
        assert 0 <= channels[0] < channels[-1] < 32
    if kind == "designed":
        assert channels == list(range(len(channels)))
    assert "kept_channels.json" in json.loads((made / "checksums.json").read_text())


def test_a_student_that_kept_every_channel_has_no_list_of_them(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path]
):
    made = json.loads(coldstill("prune", write_recipe(), "--json").stdout)
    assert not (Path(made["folder"]) / "kept_channels.json").exists()


HYBRIDS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 0,
        "expert_layer_period": 4,
        "expert_layer_offset": 1,
        "num_experts": 2,
        "use_mamba_kernels": False,
    },
}


def test_a_hybrid_whose_time_steps_go_to_infinity_is_pruned_and_stored(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path], build_model: Callable[..., Any], workplace: Path
):
    model = build_model("bamba", **HYBRIDS["bamba"])
    assert float("inf") in model.config.time_step_limit
    model.save_pretrained(workplace / "teacher")
    made = json.loads(coldstill("precompute", write_recipe(), "--json").stdout)
    student = AutoModelForCausalLM.from_pretrained(made["students"][0])
    assert student.config.attn_layer_indices == [1]
    assert float("inf") in student.config.time_step_limit


def test_blocks_that_cannot_go_are_one_line(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path], build_model: Callable[..., Any], workplace: Path
):
    build_model("jamba", **HYBRIDS["jamba"]).save_pretrained(workplace / "teacher")
    recipe = write_recipe(student={"prune": {"layers": {"method": "explicit", "blocks": [1]}}})
    error = coldstill("prune", recipe, expect=2).stderr.strip()
    assert "JambaForCausalLM cannot be cut by block 1: block 2 as block 1 is another by its " in error
    assert "attn_layer_period" in error
    assert len(error.splitlines()) == 1
    coldstill("prune", recipe, "student.prune.layers.blocks=[3]")


def test_an_interpolated_student_was_cut_from_no_block(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path]
):
    recipe = write_recipe(student={"init": {"compression": 0.6, "weights": "interpolate"}})
    error = coldstill("precompute", recipe, expect=2).stderr
    assert "mapping.strategy kept needs a student that coldstill prune cut" in error
    coldstill("precompute", recipe, "mapping.strategy=uniform")
