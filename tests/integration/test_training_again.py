"""Training that is run again: where it was killed it ends with the student and the log of a run that was not."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import text_data
from training import train_and_die, without_times
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.trainer_pt_utils import safe_globals

from coldstill.cache.errors import ColdstillError, CorruptError
from coldstill.pipeline.evaluate import evaluate
from coldstill.pipeline.precompute import precompute
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.runtime.errors import NonFiniteError, RecipeError
from coldstill.pipeline.train import train

LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
# The rate rises with each step, so that a student which gets better at first gets worse in the end.
WORSE_AND_WORSE = {
    "max_steps": 10,
    "learning_rate": 1.0,
    "lr_scheduler_type": "linear",
    "warmup_steps": 100,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_steps": 1,
    "load_best_model_at_end": True,
}

Recipes = Callable[..., Recipe]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory, model_folders: dict[str, Path], corpus: list[str]) -> Recipes:
    """Recipes over one store: 16 train rows, four batches of four an epoch, by the name of the output."""
    folder = tmp_path_factory.mktemp("again")
    data_section = text_data(folder, corpus, train_rows=16)

    def recipe(name: str, *, student: dict[str, Any] | None = None, **training: Any) -> Recipe:
        data = {
            "output": str(folder / name),
            "cache": str(folder / "caches"),
            "teacher": {"path": str(model_folders["teacher"]), "dtype": "float32"},
            "data": data_section,
            "student": {"path": str(model_folders["narrow"]), **(student or {})},
            "targets": {"logits": {"kind": "topk", "k": 4, "temperatures": [1]}, "hidden": {"blocks": [0, 1, 2, 3]}},
            "loss": {"alpha": 0.5, "beta": 0.5, "gamma": 0.1, "temperature": 1, "hidden": "mse"},
            "train": {"per_device_train_batch_size": 4, "learning_rate": 0.01, "logging_steps": 1, **training},
        }
        file = folder / "recipe.yaml"
        file.write_text(yaml.safe_dump(data))
        shutil.rmtree(data["output"], ignore_errors=True)
        return load_recipe(file)

    precompute(recipe("first"), show_progress=False)
    return recipe


def record_of(recipe: Recipe) -> dict[str, Any]:
    return json.loads((Path(recipe.output) / "train.json").read_text())


def weights_of(folder: Path, name: str = "model") -> dict[str, bytes]:
    return {key: value.numpy().tobytes() for key, value in load_file(folder / f"{name}.safetensors").items()}


def exported(recipe: Recipe) -> dict[str, bytes]:
    """Give the student and the projectors that a run exported."""
    output = Path(recipe.output)
    return weights_of(output / "student") | weights_of(output, "projectors")


def checkpoint(recipe: Recipe, step: int) -> Path:
    return Path(recipe.output) / "checkpoints" / f"checkpoint-{step}"


def checkpointed(recipe: Recipe, step: int) -> dict[str, bytes]:
    """Give the student and the projectors of a checkpoint."""
    return weights_of(checkpoint(recipe, step)) | weights_of(checkpoint(recipe, step), "projectors")


@pytest.mark.parametrize(
    ("num_steps", "training"),
    [
        pytest.param(10, {"max_steps": 10, "save_steps": 5}, id="within an epoch"),
        pytest.param(8, {"num_train_epochs": 2, "save_steps": 4}, id="at an epoch's end"),
        pytest.param(6, {"num_train_epochs": 1.5, "save_steps": 4}, id="after one and a half epochs"),
        pytest.param(
            5, {"max_steps": 5, "gradient_accumulation_steps": 3, "save_strategy": "epoch"}, id="of accumulated batches"
        ),
        pytest.param(
            8,
            {"num_train_epochs": 2, "save_steps": 4, "eval_strategy": "epoch", "logging_strategy": "epoch"},
            id="judged and logged by the epoch",
        ),
        pytest.param(
            7,
            {"max_steps": 7, "save_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_only_model": True},
            id="with the weights alone",
        ),
    ],
)
def test_a_run_killed_after_its_last_checkpoint_trains_no_step_more(
    recipes: Recipes, num_steps: int, training: dict[str, Any]
):
    recipe = recipes("killed", **training)
    first = train(recipe)
    student, record = exported(recipe), record_of(recipe)
    assert (first.num_steps, first.trained_steps, first.exported_step) == (num_steps, num_steps, num_steps)
    for removed in (["train.json", "student", "projectors.safetensors"], ["student"], ["train.json"]):
        for name in removed:
            path = Path(recipe.output) / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        again = train(recipe)
        assert (again.num_steps, again.trained_steps) == (num_steps, 0), f"without {removed}"
        assert exported(recipe) == student, f"without {removed}"
        assert without_times(record_of(recipe)["log"]) == without_times(record["log"]), f"without {removed}"
        assert again.losses == first.losses
        assert again.peak_memory_bytes >= first.peak_memory_bytes
    assert not checkpoint(recipe, num_steps + 1).exists()


def test_a_run_that_goes_on_counts_the_time_of_all_its_steps(recipes: Recipes):
    recipe = recipes("timed", max_steps=4, save_steps=4)
    train(recipe)
    (Path(recipe.output) / "train.json").unlink()
    progress = checkpoint(recipe, 4) / "progress.json"
    progress.write_text(json.dumps({**json.loads(progress.read_text()), "seconds": 1000, "peak_memory_bytes": 1 << 50}))
    again = train(recipe)
    assert 1000 < again.seconds < 1200
    assert again.tokens_per_s == pytest.approx(4 * 4 * 24 / again.seconds, rel=0.01)
    assert again.peak_memory_bytes == 1 << 50


@pytest.mark.parametrize(
    ("saved", "dies_at", "training"),
    [
        pytest.param(5, 7, {"logging_steps": 4}, id="between two logs"),
        pytest.param(4, 5, {"logging_steps": 3, "eval_strategy": "epoch"}, id="after an epoch that was judged"),
        pytest.param(4, 6, {"logging_strategy": "epoch", "eval_on_start": True}, id="logged by the epoch"),
        pytest.param(6, 7, {"logging_steps": 4, "logging_strategy": "epoch"}, id="within an epoch that is logged"),
    ],
)
def test_a_run_that_goes_on_logs_what_an_unbroken_one_does(
    recipes: Recipes, monkeypatch: pytest.MonkeyPatch, saved: int, dies_at: int, training: dict[str, Any]
):
    training = {"max_steps": 9, "save_steps": saved, "eval_strategy": "no", **training}
    whole, broken = recipes("whole", **training), recipes("broken", **training)
    train(whole)
    train_and_die(broken, at_step=dies_at, monkeypatch=monkeypatch)
    assert train(broken).trained_steps == 9 - saved
    assert exported(broken) == exported(whole)
    assert without_times(record_of(broken)["log"]) == without_times(record_of(whole)["log"])


def test_a_run_that_keeps_weights_alone_begins_anew_where_it_was_killed(
    recipes: Recipes, monkeypatch: pytest.MonkeyPatch
):
    training = {"max_steps": 6, "save_steps": 2, "save_only_model": True}
    whole, broken = recipes("whole", **training), recipes("broken", **training)
    train(whole)
    train_and_die(broken, at_step=5, monkeypatch=monkeypatch)
    assert checkpoint(broken, 4).is_dir()
    assert train(broken).trained_steps == 6, "an optimizer that has forgotten would take other steps"
    assert exported(broken) == exported(whole)


def test_a_checkpoint_is_state_alone_and_one_with_pickled_arguments_is_gone_on_from_too(
    recipes: Recipes, monkeypatch: pytest.MonkeyPatch
):
    training = {"max_steps": 6, "save_steps": 4}
    whole, broken = recipes("whole", **training), recipes("broken", **training)
    train(whole)
    train_and_die(broken, at_step=5, monkeypatch=monkeypatch)
    folder = checkpoint(broken, 4)
    of_torch = {file.name: file for file in folder.iterdir() if file.suffix not in (".json", ".safetensors")}
    assert of_torch.keys() == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    for file in of_torch.values():
        with safe_globals():
            torch.load(file, weights_only=True)
    torch.save(TrainingArguments(str(folder)), folder / "training_args.bin")  # as earlier versions did
    assert train(broken).trained_steps == 2
    assert exported(broken) == exported(whole)


@pytest.mark.parametrize(
    ("file", "weight", "said"),
    [
        (
            "model.safetensors",
            "model.layers.1.mlp.up_proj.weight",
            "lacks weights for LlamaForCausalLM: model.layers.1",
        ),
        ("projectors.safetensors", "projectors.0.linear.weight", 'Missing key(s) in state_dict: "0.linear.weight"'),
        ("adapter_model.safetensors", None, "weights of its adapters"),
    ],
)
def test_a_checkpoint_that_lacks_a_weight_is_no_place_to_go_on_from(
    recipes: Recipes, file: str, weight: str | None, said: str
):
    lora = {"student": {"lora": LORA}} if file.startswith("adapter") else {}
    recipe = recipes("lacking", max_steps=4, save_steps=4, **lora)
    precompute(recipe, show_progress=False)
    train(recipe)
    (Path(recipe.output) / "train.json").unlink()
    weights = Path(recipe.output) / "checkpoints/checkpoint-4" / file
    state = load_file(weights)
    del state[weight or next(iter(state))]
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(CorruptError, match=re.escape(said)) as caught:
        train(recipe)
    assert str(caught.value).startswith(f"checkpoint {weights.parent} is not as it was saved: ")
    assert str(caught.value).endswith("or begin anew: coldstill train --restart")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_behind_the_last_step_is_refused_in_one_line(recipes: Recipes):
    recipe = recipes("beyond", max_steps=4, save_steps=2)
    train(recipe)
    (Path(recipe.output) / "train.json").unlink()
    state = json.loads((checkpoint(recipe, 4) / "trainer_state.json").read_text())
    (checkpoint(recipe, 4) / "trainer_state.json").write_text(json.dumps({**state, "global_step": 5}))
    checkpoint(recipe, 4).rename(checkpoint(recipe, 5))
    with pytest.raises(RecipeError, match=r"checkpoint-5 is of a step behind the last one: this run has 4 steps; rem"):
        train(recipe)
    shutil.rmtree(checkpoint(recipe, 5))
    assert train(recipe).trained_steps == 2


def best_step(recipe: Recipe, metric: str = "eval_loss", choose: Callable[..., Any] = min) -> int:
    """Give the step with the best of what evaluation said, which is neither the first that was judged nor the last."""
    judged = {entry["step"]: entry[metric] for entry in record_of(recipe)["log"] if metric in entry}
    best = int(choose(judged, key=judged.__getitem__))
    assert min(judged) < best < max(judged), f"{metric} is best at an end: {judged}"
    return best


@pytest.mark.parametrize(
    "training",
    [
        pytest.param({}, id="of all steps"),
        pytest.param({"save_total_limit": 1}, id="where one is kept"),
        pytest.param({"save_steps": 5}, id="at a step that is not due to be saved"),
        pytest.param({"eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": 24}, id="by the epoch"),
        pytest.param({"save_strategy": "best", "metric_for_best_model": "loss"}, id="saved where it is better"),
        pytest.param({"metric_for_best_model": "loss_logits"}, id="by the divergence"),
        pytest.param({"metric_for_best_model": "eval_loss_hidden"}, id="by the hidden loss"),
    ],
)
def test_the_best_student_and_its_projectors_are_what_is_exported(recipes: Recipes, training: dict[str, Any]):
    recipe = recipes("best", **{**WORSE_AND_WORSE, **training})
    summary = train(recipe)
    metric = training.get("metric_for_best_model", "eval_loss")
    best = best_step(recipe, f"eval_{metric.removeprefix('eval_')}")
    assert summary.exported_step == record_of(recipe)["summary"]["exported_step"] == best
    assert summary.num_steps == summary.trained_steps == training.get("max_steps", 10)
    assert exported(recipe) == checkpointed(recipe, best)
    if "save_total_limit" in training:
        kept = {folder.name for folder in checkpoint(recipe, best).parent.glob("checkpoint-*")}
        assert kept == {f"checkpoint-{best}", "checkpoint-10"}
    (Path(recipe.output) / "train.json").unlink()
    again = train(recipe)
    assert again.exported_step == best
    assert exported(recipe) == checkpointed(recipe, best)


def test_a_loss_is_never_better_where_it_is_greater(recipes: Recipes):
    with pytest.raises(RecipeError, match=r"train\.greater_is_better is decided by the losses, all of which"):
        recipes("worst", **WORSE_AND_WORSE, greater_is_better=True)


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_run_that_diverges_ends_in_one_line_and_exports_nothing(recipes: Recipes, logging_steps: int):
    recipe = recipes("diverged", max_steps=6, learning_rate=1e30, logging_steps=logging_steps)
    precompute(recipe, show_progress=False)
    with pytest.raises(NonFiniteError, match=r"^training has diverged: student\..* is not finite at step [2-6], and"):
        train(recipe)
    assert not (Path(recipe.output) / "student").exists()
    assert not (Path(recipe.output) / "train.json").exists()


def test_a_student_that_gives_no_finite_numbers_is_judged_in_one_line(recipes: Recipes):
    recipe = recipes("judged", max_steps=2)
    precompute(recipe, show_progress=False)
    train(recipe)
    file = Path(recipe.output) / "student/model.safetensors"
    state = load_file(file)
    # Finite numbers, of which the model makes none.
    state["lm_head.weight"][:] = 3e38
    save_file(state, file, {"format": "pt"})
    with pytest.raises(NonFiniteError, match="^the recovered student in .* gives no finite numbers on eval row 0"):
        evaluate(recipe, show_progress=False)


def test_a_student_without_its_weights_is_exported_again(recipes: Recipes):
    recipe = recipes("emptied", max_steps=4, save_steps=4)
    precompute(recipe, show_progress=False)
    train(recipe)
    before = exported(recipe)
    (Path(recipe.output) / "student/model.safetensors").unlink()
    assert train(recipe).trained_steps == 0
    assert exported(recipe) == before


# PEFT asks for a property of models by a name that transformers calls deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_best_adapters_are_what_is_exported(recipes: Recipes):
    recipe = recipes("lora", student={"lora": LORA}, **WORSE_AND_WORSE | {"learning_rate": 30.0})
    summary = train(recipe)
    best = best_step(recipe)
    assert summary.exported_step == best
    assert weights_of(Path(recipe.output) / "adapters", "adapter_model") == weights_of(
        checkpoint(recipe, best), "adapter_model"
    )
    assert weights_of(Path(recipe.output), "projectors") == weights_of(checkpoint(recipe, best), "projectors")
    student = AutoModelForCausalLM.from_pretrained(summary.student)
    assert all(torch.isfinite(value).all() for value in student.state_dict().values())


def test_a_run_that_goes_on_elsewhere_knows_its_best_step(recipes: Recipes, monkeypatch: pytest.MonkeyPatch):
    training = {**WORSE_AND_WORSE, "save_total_limit": 1}
    whole, broken, moved = (recipes(name, **training) for name in ("whole", "broken", "moved"))
    train(whole)
    best = best_step(whole)
    train_and_die(broken, at_step=best + 1, monkeypatch=monkeypatch)
    Path(broken.output).rename(moved.output)
    assert train(moved).exported_step == best
    assert exported(moved) == exported(whole)
    (Path(moved.output) / "train.json").unlink()
    shutil.rmtree(checkpoint(moved, best))
    with pytest.raises(ColdstillError, match=f"checkpoint-{best}, the best checkpoint so far, is gone, and train.load"):
        train(moved)


def test_the_last_step_is_exported_with_a_warning_where_nothing_that_was_judged_is_finite(recipes: Recipes):
    recipe = recipes("nan", **{**WORSE_AND_WORSE, "max_steps": 2, "eval_delay": 5})
    with pytest.warns(UserWarning, match="train.load_best_model_at_end: no evaluation gave a finite loss"):
        assert train(recipe).exported_step == 2


@pytest.mark.parametrize("metric", ["accuracy", "eval_loss_dynamics"])
def test_a_metric_that_no_evaluation_gives_is_one_line_before_anything_runs(recipes: Recipes, metric: str):
    with pytest.raises(
        RecipeError, match=f"train.metric_for_best_model is '{metric}', which no evaluation gives; .* eval_loss_hidden$"
    ):
        recipes("unknown", **WORSE_AND_WORSE, metric_for_best_model=metric)


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"max_steps": 0}, "train.max_steps must be above 0, got 0; leave it out, or give -1"),
        ({"max_steps": -5}, "train.max_steps must be above 0, got -5"),
        ({"num_train_epochs": 0}, "train.num_train_epochs must be above 0, got 0"),
        ({"num_train_epochs": -0.5}, "train.num_train_epochs must be above 0, got -0.5"),
        ({"num_train_epochs": float("inf")}, "train.num_train_epochs must be a finite number, got inf"),
    ],
)
def test_a_run_of_no_steps_is_one_line(recipes: Recipes, training: dict[str, Any], said: str):
    with pytest.raises(RecipeError, match=said):
        recipes("none", **training)
    assert recipes("all", max_steps=-1).train["max_steps"] == -1
