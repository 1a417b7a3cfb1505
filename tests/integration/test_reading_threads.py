"""Rows that threads read train the student that rows read in turn do, through evaluations and interruptions."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from training import train_and_die, without_times

from coldstill.pipeline.precompute import precompute
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.stage_two.resumable_trainer import newest_checkpoint
from coldstill.pipeline.stage_two.run_folder import checkpoints_folder
from coldstill.pipeline.train import train


def student_of(recipe: Recipe) -> bytes:
    return (Path(recipe.output) / "student" / "model.safetensors").read_bytes()


def newest_state(recipe: Recipe) -> Path:
    _, folder = newest_checkpoint(checkpoints_folder(recipe))
    return Path(str(folder)) / "trainer_state.json"


def test_threads_train_the_same_student_to_the_bit_and_go_on_where_a_run_died(
    write_recipe: Callable[..., Path], workplace: Path, monkeypatch: pytest.MonkeyPatch
):
    often = {"max_steps": 9, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "learning_rate": 0.001}
    often |= {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 4, "save_steps": 2}
    recipes = [
        load_recipe(
            write_recipe(output=str(workplace / f"run-{threads}"), train={**often, "dataloader_threads": threads})
        )
        for threads in (0, 3)
    ]
    precompute(*recipes, show_progress=False)
    in_turn, by_threads = recipes
    train(in_turn)
    train_and_die(by_threads, at_step=7, monkeypatch=monkeypatch)
    train(by_threads)
    assert student_of(by_threads) == student_of(in_turn)
    logs = [without_times(json.loads(newest_state(recipe).read_text())["log_history"]) for recipe in recipes]
    assert logs[0] == logs[1]
    assert sum("eval_loss_logits" in entry for entry in logs[0]) >= 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("coldstill-")]
