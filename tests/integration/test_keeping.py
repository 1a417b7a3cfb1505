"""The best step is kept: an overfitting run exports the student that was nearest to its teacher on the eval rows."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from tiny import text_data
from training import train_and_die, without_times

from coldstill.pipeline.precompute import precompute
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.report import report
from coldstill.pipeline.runtime.errors import RecipeError
from coldstill.pipeline.stage_two.run_folder import decisive_sections
from coldstill.pipeline.train import train

# One row, read over and over at a high rate: the student learns it by heart.
OVERFIT = {
    "per_device_train_batch_size": 1,
    "max_steps": 22,
    "learning_rate": 0.01,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "logging_steps": 1,
}

Recipes = Callable[..., Recipe]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory, model_folders: dict[str, Path], corpus: list[str]) -> Recipes:
    """Recipes over one train row and six eval rows of its text, by the name of the output."""
    folder = tmp_path_factory.mktemp("keeping")
    data_section = text_data(folder, corpus, train_rows=1)
    (folder / "other.txt").write_text("\n".join(corpus[200:260]))
    other = {"path": "text", "data_files": str(folder / "other.txt"), "max_rows": 3, "label": "elsewhere"}
    lists = {**data_section, "eval": [{**data_section["eval"], "label": "own"}, other]}

    def recipe(name: str, *, loss: dict[str, Any] | None = None, of_two: bool = False, **training: Any) -> Recipe:
        data = {
            "output": str(folder / name),
            "cache": str(folder / "caches"),
            "teacher": {"path": str(model_folders["teacher"]), "dtype": "float32"},
            "data": lists if of_two else data_section,
            "student": {"path": str(model_folders["narrow"])},
            "targets": {"hidden": {"blocks": "none"}},
            "loss": {"alpha": 0.5, "beta": 0.5, "gamma": 0.0, "temperature": 1.0, **(loss or {})},
            "train": {**OVERFIT, **training},
        }
        file = folder / "recipe.yaml"
        file.write_text(yaml.safe_dump(data))
        shutil.rmtree(data["output"], ignore_errors=True)
        return load_recipe(file)

    precompute(recipe("first"), recipe("second", of_two=True), show_progress=False)
    return recipe


def record_of(recipe: Recipe) -> dict[str, Any]:
    return json.loads((Path(recipe.output) / "train.json").read_text())


def judged(recipe: Recipe, metric: str = "eval_loss_logits") -> dict[int, float]:
    """Give what was judged, the divergence on the eval rows, by step."""
    return {entry["step"]: entry[metric] for entry in record_of(recipe)["log"] if metric in entry}


def best_of(by_step: dict[int, float]) -> int:
    return min(by_step, key=by_step.__getitem__)


def weights_of(folder: Path) -> dict[str, bytes]:
    return {key: value.numpy().tobytes() for key, value in load_file(folder / "model.safetensors").items()}


def exported(recipe: Recipe) -> dict[str, bytes]:
    return weights_of(Path(recipe.output) / "student")


def test_a_student_that_learns_its_only_row_by_heart_is_exported_as_it_was_before_that(recipes: Recipes):
    last, best = recipes("last", eval_strategy="steps", eval_steps=3), recipes("best", keep="best")
    train(last)
    summary = train(best)
    by_step = judged(best)
    assert list(by_step) == [0, *range(3, 22, 3), 22], "the start, some ten times over the run, and the end"
    step = best_of(by_step)
    assert 0 < step < 22, by_step
    assert summary.exported_step == step
    assert exported(best) == weights_of(Path(best.output) / "checkpoints" / f"checkpoint-{step}")
    assert exported(best) != exported(last)
    kept = {"measure": "eval_loss_logits", "step": step, "value": by_step[step], "start_value": by_step[0]}
    kept |= {"last_step": 22, "last_value": by_step[22]}
    assert record_of(best)["summary"]["kept"] == kept
    assert record_of(last)["summary"]["kept"] is None
    checkpoints = {path.name for path in (Path(best.output) / "checkpoints").glob("checkpoint-*")}
    assert checkpoints == {f"checkpoint-{step}", "checkpoint-22"}, "the best and the newest"
    assert train(best) == summary.__class__(**{**vars(summary), "trained_steps": 0})


def test_a_student_that_training_only_harms_is_exported_as_it_was(recipes: Recipes):
    recipe = recipes("harmed", keep="best", learning_rate=1.0, max_steps=4)
    summary = train(recipe)
    by_step = judged(recipe)
    assert best_of(by_step) == summary.exported_step == 0 < by_step[4] - by_step[0]
    before = weights_of(Path(recipe.student.path or ""))
    assert exported(recipe) == before
    assert str(summary.kept).startswith("the student as it was before training: eval_loss_logits ")
    (Path(recipe.output) / "train.json").unlink()
    assert train(recipe).exported_step == 0
    assert exported(recipe) == before


@pytest.mark.parametrize("dies_at", [0, 5, 15])
def test_a_killed_run_keeps_what_an_unbroken_one_keeps(recipes: Recipes, monkeypatch: pytest.MonkeyPatch, dies_at: int):
    whole, broken = recipes("whole", keep="best"), recipes("broken", keep="best")
    train(whole)
    train_and_die(broken, at_step=dies_at, monkeypatch=monkeypatch)
    # The start is a checkpoint already, and no checkpoint is without its run.
    with pytest.raises(RecipeError, match="holds a run of another recipe"):
        train(broken.model_copy(update={"train": {**broken.train, "learning_rate": 0.5}}))
    assert train(broken).kept == train(whole).kept is not None
    assert exported(broken) == exported(whole)
    assert without_times(record_of(broken)["log"]) == without_times(record_of(whole)["log"])


def test_where_there_are_several_sources_those_that_train_does_not_read_decide(recipes: Recipes, tmp_path: Path):
    recipe = recipes("others", keep="best", of_two=True, eval_strategy="steps", eval_steps=2)
    summary = train(recipe)
    own, other = judged(recipe, "eval_own_loss_logits"), judged(recipe, "eval_elsewhere_loss_logits")
    assert best_of(own) != best_of(other)
    assert judged(recipe, "eval_loss_logits_of_others") == pytest.approx(other)
    assert judged(recipe) == pytest.approx({step: (6 * own[step] + 3 * other[step]) / 9 for step in own})
    assert summary.exported_step == best_of(other)
    assert summary.kept is not None
    assert summary.kept.measure == "eval_loss_logits_of_others"
    page = Path(report(Path(recipe.output), output=tmp_path, show_progress=False).page).read_text()
    assert f"Kept: step {best_of(other)} of 22: eval_loss_logits_of_others {min(other.values()):.4f} (" in page


@pytest.mark.parametrize(
    ("training", "loss", "said"),
    [
        (
            {"save_strategy": "no"},
            {},
            "train.keep is best, but train.save_strategy no saves none of what could be kept",
        ),
        (
            {"eval_strategy": "no"},
            {},
            "train.keep is best, but train.eval_strategy no judges nothing: remove train.eval",
        ),
        ({"metric_for_best_model": "loss"}, {}, "train.keep best goes by the divergence .*: remove train.metric_for_b"),
        (
            {},
            {"alpha": 1.0, "beta": 0.0},
            "train.keep best goes by the divergence .*, but loss.beta is 0: set it above",
        ),
        (
            {},
            {"schedule": {"temperature": {"end": 4.0}}},
            "compares the divergence of different steps, but loss.schedule",
        ),
        (
            {"keep": "last", "load_best_model_at_end": True},
            {},
            "train.keep is last, but train.load_best_model_at_end is",
        ),
        ({"keep": "first"}, {}, "train.keep must be best or last, got 'first'"),
        ({"kep": "best"}, {}, "unknown key 'train.kep': .*did you mean 'keep'"),
    ],
)
def test_what_contradicts_it_is_one_line(recipes: Recipes, training: dict[str, Any], loss: dict[str, Any], said: str):
    with pytest.raises(RecipeError, match=said) as caught:
        recipes("contrary", loss=loss, **{"keep": "best", **training})
    assert "\n" not in str(caught.value)


def test_to_keep_the_last_is_what_a_recipe_without_the_key_says(recipes: Recipes):
    plain, last, best = (
        decisive_sections(recipes("named", **keep)) for keep in ({}, {"keep": "last"}, {"keep": "best"})
    )
    assert plain == last != best
    other = decisive_sections(recipes("named", keep="best", eval_steps=3, eval_strategy="steps", save_steps=7))
    assert set(other["train"]) - set(best["train"]) == {"eval_steps", "eval_strategy"}, "when it is judged decides"
