"""Training is told to stop by real signals: it saves its step, says which one that is, and goes on from there."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from crash.signals import CHILD_TIMEOUT_S, last_line, read_until, started
from crash.trees import small_recipe
from forked import Forks
from safetensors.torch import load_file
from training import without_times

from coldstill.pipeline.precompute import precompute
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.train import train

NUM_STEPS = 60
EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
FIRST_SAID = "coldstill: interrupted: this step is finished and saved first; interrupt once more to end at once"


@pytest.fixture(scope="module")
def write_recipe(
    tmp_path_factory: pytest.TempPathFactory, model_folders: dict[str, Path], corpus: list[str]
) -> Callable[..., Path]:
    """Write recipes over one store, each with a name, which is its output's too, and with training of its own."""
    folder = tmp_path_factory.mktemp("signals")

    def write(name: str, **training: Any) -> Path:
        common = {"max_steps": NUM_STEPS, "per_device_train_batch_size": 2, "logging_steps": 4, "save_steps": 1000}
        data = small_recipe(
            folder,
            model_folders["teacher"],
            corpus[:30],
            student={"path": str(model_folders["narrow"])},
            targets={"logits": {"kind": "topk", "k": 4, "temperatures": [1]}},
            loss={"alpha": 0.5, "beta": 0.5, "gamma": 0.1, "temperature": 1, "hidden": "mse"},
            train={**common, **training},
        )
        data["output"] = str(folder / name)
        shutil.rmtree(data["output"], ignore_errors=True)
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(data))
        return file

    precompute(load_recipe(write("whole")), show_progress=False)
    return write


def steps_saved(output: Path) -> list[int]:
    return sorted(int(folder.name.rpartition("-")[2]) for folder in output.glob("checkpoints/checkpoint-*"))


def result_of(output: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """Give the exported student and projectors of a run, and what it logged."""
    files = [output / "student/model.safetensors", output / "projectors.safetensors"]
    weights = {name: value.numpy().tobytes() for file in files for name, value in load_file(file).items()}
    return weights, without_times(json.loads((output / "train.json").read_text())["log"])


@pytest.fixture(scope="module")
def whole(write_recipe: Callable[..., Path]) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    recipe = load_recipe(write_recipe("whole"))
    train(recipe)
    return result_of(Path(recipe.output))


@pytest.mark.parametrize(
    ("number", "training"),
    [
        pytest.param(signal.SIGINT, {"save_only_model": True}, id="SIGINT, where weights alone are kept"),
        pytest.param(signal.SIGTERM, {}, id="SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_training_that_is_told_to_stop_saves_its_step_and_goes_on_to_the_same_bytes(
    forks: Forks,
    write_recipe: Callable[..., Path],
    whole: tuple[dict[str, bytes], list[dict[str, Any]]],
    number: signal.Signals,
    training: dict[str, Any],
):
    file = write_recipe("stopped", **training)
    output = file.with_suffix("")
    with started(forks, "train", str(file)) as child:
        read_until(child.stderr, "'loss_hidden'")
        child.send_signal(number)
        stdout, stderr = child.communicate(timeout=CHILD_TIMEOUT_S)
    assert child.returncode == EXIT_CODES[number], stderr
    assert FIRST_SAID in stderr
    (step,) = steps_saved(output)
    assert 4 <= step < NUM_STEPS
    assert last_line(stderr) == (f"interrupted at step {step}, which is saved; run the same command again to go on")
    assert stdout == ""
    assert not (output / "train.json").exists()
    assert train(load_recipe(file)).trained_steps == NUM_STEPS - step
    assert result_of(output) == whole


def test_a_second_signal_ends_at_once_and_nothing_is_called_saved_that_is_not(
    forks: Forks, write_recipe: Callable[..., Path]
):
    file = write_recipe("twice")
    with started(forks, "train", str(file)) as child:
        read_until(child.stderr, f"0/{NUM_STEPS} ")
        behind = forks.pid_behind(child.pid)
        # Stopped meanwhile, so that both come within one step.
        for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
            os.kill(behind, number)
        _, stderr = child.communicate(timeout=CHILD_TIMEOUT_S)
    assert child.returncode == 143, stderr
    assert FIRST_SAID in stderr
    assert re.fullmatch(
        r"interrupted (before a step was taken|at step \d+), with none saved; the same command begins anew",
        last_line(stderr),
    )
    assert steps_saved(file.with_suffix("")) == []
