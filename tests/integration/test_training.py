"""The trainer as its users drive it: resume, accumulation, checkpointing, mixed precision, projectors, exports."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from training import gradients, train_and_die, trainer_of, without_times
from transformers import AutoModelForCausalLM, AutoTokenizer

from coldstill.pipeline.precompute import precompute
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.runtime.errors import RecipeError
from coldstill.pipeline.students.folders import find_student
from coldstill.pipeline.train import train


def weights(folder: Path) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("stop", [3, 5, 8])
def test_ten_steps_equal_some_then_resume_then_the_rest_byte_for_byte(
    write_recipe: Callable[..., Path], workplace: Path, stop: int, monkeypatch: pytest.MonkeyPatch
):
    # 20 rows in batches of 4 are five steps an epoch: the stops lie within the first, at its end, within the second.
    changes: dict[str, Any] = {
        "student": {"path": str(workplace / "narrow")},
        "mapping": {"strategy": "uniform"},
        "train__max_steps": 10,
        "train__save_steps": stop,
        "train__logging_steps": 1,
        "projector__learning_rate": 0.01,
    }
    precompute(load_recipe(write_recipe(**changes)), show_progress=False)
    whole = load_recipe(write_recipe(output=str(workplace / "whole"), **changes))
    train(whole)

    broken = load_recipe(write_recipe(output=str(workplace / "broken"), **changes))
    train_and_die(broken, at_step=stop, monkeypatch=monkeypatch)
    summary = train(broken)
    assert summary.trained_steps == 10 - stop
    assert weights(workplace / "broken/student") == weights(workplace / "whole/student")
    logs = [json.loads((workplace / name / "train.json").read_text())["log"][:-1] for name in ("whole", "broken")]
    assert without_times(logs[0]) == without_times(logs[1])
    last = "checkpoints/checkpoint-10/projectors.safetensors"
    assert (workplace / "broken" / last).read_bytes() == (workplace / "whole" / last).read_bytes()


def test_the_exported_student_is_a_plain_model_without_projectors(write_recipe: Callable[..., Path], workplace: Path):
    recipe = load_recipe(
        write_recipe(student={"path": str(workplace / "narrow")}, mapping={"strategy": "uniform"}, train__save_steps=2)
    )
    precompute(recipe, show_progress=False)
    train(recipe)
    folder = workplace / "run/student"
    assert not any("projector" in name for name in load_file(folder / "model.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    generated = model.generate(
        **AutoTokenizer.from_pretrained(folder)("The class", return_tensors="pt"), max_new_tokens=4
    )
    assert generated.shape[1] > 4
    checkpoint = workplace / "run/checkpoints/checkpoint-2"
    assert set(load_file(checkpoint / "projectors.safetensors")) == {
        "projectors.0.linear.weight",
        "projectors.1.linear.weight",
    }
    AutoModelForCausalLM.from_pretrained(checkpoint)
    assert json.loads((folder / "provenance.json").read_text())["run"]["loss"]["temperature"] == 2.0


def test_every_term_is_logged_and_the_terms_make_up_the_loss(write_recipe: Callable[..., Path], workplace: Path):
    recipe = load_recipe(write_recipe(train__eval_strategy="epoch"))
    precompute(recipe, show_progress=False)
    train(recipe)
    log = json.loads((workplace / "run/train.json").read_text())["log"]
    steps = [entry for entry in log if "loss" in entry]
    assert len(steps) == 2
    for entry in steps:
        parts = 0.5 * entry["loss_task"] + 0.5 * entry["loss_logits"] + 0.1 * entry["loss_hidden"]
        assert entry["loss"] == pytest.approx(parts, rel=1e-5)
    assert any("eval_loss" in entry for entry in log)


def test_accumulated_parts_of_rows_of_several_lengths_train_as_the_whole_batch(
    write_recipe: Callable[..., Path], workplace: Path
):
    rows = {"data__packing": False, "data__sequence_length": 60, "train__max_steps": 2, "train__optim": "sgd"}
    runs = {"whole": (4, 1), "parts": (1, 4)}
    for name, (batch, accumulation) in runs.items():
        train_section = {
            "train__per_device_train_batch_size": batch,
            "train__gradient_accumulation_steps": accumulation,
        }
        recipe = load_recipe(
            write_recipe(output=str(workplace / name), train__learning_rate=0.1, **rows, **train_section)
        )
        precompute(recipe, show_progress=False)
        train(recipe)
    whole, parts = (load_file(workplace / name / "student/model.safetensors") for name in runs)
    start = load_file(find_student(recipe) / "model.safetensors")
    for name, value in whole.items():
        moved = (value - start[name]).abs().max()
        assert (value - parts[name]).abs().max() <= 1e-4 * moved + 1e-7, name
    logs = [json.loads((workplace / name / "train.json").read_text())["log"][0] for name in runs]
    for term in ("loss", "loss_task", "loss_logits", "loss_hidden"):
        assert logs[0][term] == pytest.approx(logs[1][term], rel=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(write_recipe: Callable[..., Path], reentrant: bool):
    hidden_alone = {"alpha": 0.0, "beta": 0.0, "gamma": 1.0}
    plain = load_recipe(write_recipe(loss=hidden_alone))
    precompute(plain, show_progress=False)
    want = gradients(trainer_of(plain))
    kwargs = {
        "train__activation_checkpointing": True,
        "train__activation_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    trainer = trainer_of(load_recipe(write_recipe(loss=hidden_alone, **kwargs)))
    trainer.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    got = gradients(trainer)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.allclose(got[name], value, rtol=1e-5, atol=1e-7), name


def test_bfloat16_autocast_stays_near_float32(write_recipe: Callable[..., Path]):
    plain = load_recipe(write_recipe())
    precompute(plain, show_progress=False)
    want = gradients(trainer_of(plain))
    got = gradients(trainer_of(load_recipe(write_recipe(train__bf16=True))))
    flat = [torch.cat([value.flatten() for value in found.values()]) for found in (want, got)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.99
    assert all(value.dtype == torch.float32 for value in got.values())


@pytest.mark.parametrize("workers", [1, 2])
def test_dataloader_workers_give_the_same_batches(write_recipe: Callable[..., Path], workers: int):
    recipe = load_recipe(write_recipe())
    precompute(recipe, show_progress=False)
    alone = list(trainer_of(recipe).get_train_dataloader())
    shared = list(trainer_of(load_recipe(write_recipe(train__dataloader_num_workers=workers))).get_train_dataloader())
    assert len(alone) == len(shared) == 5
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(one["logits"]["logsumexp"]["values"], other["logits"]["logsumexp"]["values"])


@pytest.mark.parametrize(("method", "num_workers"), [("fork", 2), ("spawn", 1)])  # a spawned one imports everything
def test_workers_read_although_the_store_was_read_before_they_were_started(
    write_recipe: Callable[..., Path], method: str, num_workers: int
):
    recipe = load_recipe(write_recipe())
    precompute(recipe, show_progress=False)
    trainer = trainer_of(recipe)
    rows = trainer.train_dataset
    first = rows[0]  # opens the store, and starts the threads of whatever reads it
    loader = DataLoader(
        rows,
        batch_size=4,
        num_workers=num_workers,
        multiprocessing_context=method,
        collate_fn=trainer.data_collator,
        timeout=60,
    )
    batches = list(loader)
    assert sum(len(batch["input_ids"]) for batch in batches) == len(rows) == 20
    assert np.array_equal(batches[0]["input_ids"][0], first.arrays["tokens"]["ids"])


def test_fixed_projectors_do_not_move_and_a_rate_of_their_own_is_used(
    write_recipe: Callable[..., Path], workplace: Path
):
    narrow = {"student": {"path": str(workplace / "narrow")}, "mapping": {"strategy": "uniform"}}
    recipe = load_recipe(write_recipe(**narrow, projector={"learnable": False}))
    precompute(recipe, show_progress=False)
    trainer = trainer_of(recipe)
    before = {name: value.clone() for name, value in trainer.model.projectors.state_dict().items()}
    trainer.train()
    for name, value in trainer.model.projectors.state_dict().items():
        assert torch.equal(value, before[name])
    trainer = trainer_of(load_recipe(write_recipe(**narrow, projector={"learning_rate": 0.5})))
    groups = trainer.create_optimizer().param_groups
    rates: dict[float, int] = {}
    for group in groups:
        rates[group["lr"]] = rates.get(group["lr"], 0) + sum(map(torch.numel, group["params"]))
    assert rates[0.5] == 2 * 16 * 32
    assert rates[0.001] == sum(map(torch.numel, trainer.model.student.parameters()))


def test_an_output_that_holds_another_recipes_run_is_refused_until_restart(
    write_recipe: Callable[..., Path], workplace: Path
):
    recipe = load_recipe(write_recipe())
    precompute(recipe, show_progress=False)
    train(recipe)
    other = load_recipe(write_recipe(loss__alpha=0.9))
    with pytest.raises(
        RecipeError, match=r"run holds a run of another recipe \(loss differ; .* coldstill train --restart"
    ):
        train(other)
    assert train(other, restart=True).trained_steps == 4
    assert train(other).trained_steps == 0
