"""Presets: defaults behind what a recipe says, written out in the resolved recipe."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from coldstill.pipeline.recipe.file import dump_recipe, load_recipe
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.runtime.errors import RecipeError

LAYERS, MLP, HIDDEN = {"layers": {"remove": 2}}, {"mlp": {"keep": 0.7}}, {"hidden": {"size": 448}}
BOOK_DEPTH, BOOK_WIDTH = (0.5, 0.5, 0.1), (0.4, 0.4, 0.2)
LEARNED = (0.0, 1.0, 0.0)  # from the teacher's distribution alone
CUTS = ["depth", "width", "both"]
# What training does where a recipe says nothing, but for the learning rate.
SILENT = {"lr_scheduler_type": "cosine", "warmup_steps": 0.1, "per_device_train_batch_size": 4}


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Load a recipe of a student and further sections, with overrides."""

    def load(student: dict[str, Any], *overrides: str, **sections: Any) -> Recipe:
        data = {
            "output": "runs/x",
            "teacher": {"path": "somewhere"},
            "data": {"train": {"path": "text"}, "eval": {"path": "json"}},
            "student": student,
            **sections,
        }
        path = tmp_path / "r.yaml"
        path.write_text(yaml.safe_dump(data))
        return load_recipe(path, overrides)

    return load


def weights(recipe: Recipe) -> tuple[float, float, float]:
    return recipe.loss.alpha, recipe.loss.beta, recipe.loss.gamma


@pytest.mark.parametrize(
    ("preset", "want"), [("depth", BOOK_DEPTH), ("width", BOOK_WIDTH), ("both", BOOK_WIDTH)], ids=CUTS
)
def test_the_books_presets_give_its_weights_temperature_rate_and_epochs(
    load: Any, preset: str, want: tuple[float, float, float]
):
    mild, aggressive = (load({"path": "there"}, preset=f"book_{preset}{end}") for end in ("", "_aggressive"))
    assert weights(mild) == weights(aggressive) == want
    assert {mild.loss.hidden, aggressive.loss.hidden} == {"mse"}
    assert (mild.loss.temperature, aggressive.loss.temperature) == (2.0, 3.0)
    assert mild.train == {"learning_rate": 1e-5, "num_train_epochs": 3.0}
    assert aggressive.train == {"learning_rate": 1e-5, "num_train_epochs": 5.0}


@pytest.mark.parametrize(("preset", "rate"), [("depth", 2e-4), ("width", 5e-4), ("both", 5e-4)], ids=CUTS)
def test_what_was_measured_is_the_teachers_distribution_alone_and_a_rate_for_each_cut(
    load: Any, preset: str, rate: float
):
    recipe = load({"path": "there"}, preset=preset)
    assert (weights(recipe), recipe.loss.temperature) == (LEARNED, 1.0)
    assert recipe.train == {"learning_rate": rate}


@pytest.mark.parametrize(
    ("cuts", "same_as"),
    [
        (LAYERS, "depth"),
        (MLP, "width"),
        (HIDDEN, "width"),
        ({"heads": {"keep": 0.5}}, "width"),
        ({**MLP, **HIDDEN}, "width"),
        ({**LAYERS, **MLP}, "both"),
        ({**LAYERS, **HIDDEN}, "both"),
        ({**LAYERS, "mlp": None}, "depth"),
    ],
    ids=str,
)
def test_auto_and_the_book_go_by_what_is_pruned(load: Any, cuts: dict[str, Any], same_as: str):
    pairs = {"auto": same_as, "book": f"book_{same_as}", "book_aggressive": f"book_{same_as}_aggressive"}
    for going_by, name in pairs.items():
        auto, named = (load({"prune": cuts}, preset=preset) for preset in (going_by, name))
        assert auto.loss == named.loss
        assert auto.train == named.train


@pytest.mark.parametrize("student", [{"path": "there"}, {"init": {"compression": 0.5}}], ids=["path", "init"])
def test_auto_without_a_cut_to_go_by_is_one_line_that_says_to_name_one(load: Any, student: dict[str, Any]):
    with pytest.raises(RecipeError, match=r"preset auto goes by student.prune.*name one of depth, width, both$"):
        load(student, preset="auto")
    with pytest.raises(RecipeError, match="name one of book_depth, book_width, book_both$"):
        load(student, preset="book")
    with pytest.raises(RecipeError, match="name one of book_depth_aggressive, book_width_aggressive, book_both_"):
        load(student, preset="book_aggressive")


def test_what_the_recipe_or_the_command_line_says_wins(load: Any):
    recipe = load(
        {"path": "there"},
        "loss.alpha=0.7",
        "train.num_train_epochs=1",
        preset="book_width_aggressive",
        loss={"gamma": 0.0, "hidden": "cosine"},
        train={"learning_rate": 1e-3, "bf16": True},
    )
    assert weights(recipe) == (0.7, 0.4, 0.0)
    assert (recipe.loss.temperature, recipe.loss.hidden) == (3.0, "cosine")
    assert recipe.train == {"learning_rate": 1e-3, "num_train_epochs": 1.0, "bf16": True}


def test_the_preset_itself_may_come_from_the_command_line(load: Any):
    assert weights(load({"prune": LAYERS}, "preset=book_both", preset="depth")) == BOOK_WIDTH


def test_without_a_preset_the_defaults_stay(load: Any):
    recipe = load({"prune": MLP})
    assert weights(recipe) == LEARNED
    assert recipe.train == {}


@pytest.mark.parametrize(
    ("student", "rate"),
    [
        ({"path": "there"}, 2e-4),
        ({"init": {"compression": 0.5}}, 2e-4),
        ({"prune": LAYERS}, 2e-4),
        ({"prune": MLP}, 2e-4),
        ({"prune": {**LAYERS, **MLP}}, 2e-4),
        ({"prune": HIDDEN}, 5e-4),
        ({"prune": {**LAYERS, **HIDDEN}}, 5e-4),
        ({"prune": MLP, "lora": {"r": 8}}, 1e-3),
    ],
    ids=str,
)
def test_without_a_learning_rate_it_goes_by_the_student(load: Any, student: dict[str, Any], rate: float):
    assert load(student).training == {**SILENT, "learning_rate": rate}
    assert yaml.safe_load(dump_recipe(load(student)))["train"] == load(student).training
    said = load(student, train={"learning_rate": 0.5, "per_device_train_batch_size": 8})
    assert said.training == {**SILENT, "learning_rate": 0.5, "per_device_train_batch_size": 8}
    if "prune" in student:
        assert load(student, preset="auto").training == load(student).training


def test_the_resolved_recipe_says_every_value_and_loads_to_the_same(load: Any, tmp_path: Path):
    recipe = load({"prune": {**LAYERS, **MLP}}, preset="book_aggressive", loss={"alpha": 0.45})
    resolved = yaml.safe_load(dump_recipe(recipe))
    assert {name: resolved["loss"][name] for name in ("alpha", "beta", "gamma", "temperature")} == {
        "alpha": 0.45,
        "beta": 0.4,
        "gamma": 0.2,
        "temperature": 3.0,
    }
    assert resolved["train"] == {**SILENT, "learning_rate": 1e-5, "num_train_epochs": 5.0}
    (tmp_path / "resolved.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "resolved.yaml") == recipe.model_copy(update={"train": recipe.training})
    # What was resolved stays, whatever the preset is changed to.
    assert load_recipe(tmp_path / "resolved.yaml", ["preset=depth"]).loss == recipe.loss


@pytest.mark.parametrize(
    ("student", "sections", "message"),
    [
        ({"path": "there"}, {"preset": "deep"}, "preset in .*: Input should be 'auto', 'depth', .*got 'deep'"),
        ({"path": "there"}, {"preset": "depth", "loss": 3}, "loss in .*: Input should be a valid dictionary"),
        ({"path": "there"}, {"preset": "depth", "loss": {"gama": 1}}, "unknown key 'loss.gama'"),
        ({}, {"preset": "auto"}, "student takes exactly one of"),
        ({"prune": {}}, {"preset": "auto"}, "prune needs layers, heads, mlp or hidden"),
        ({"path": "there"}, {"presett": "auto"}, "unknown key 'presett' in .*; did you mean 'preset'?"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_preset_hides_no_other_mistake(load: Any, student: Any, sections: dict[str, Any], message: str):
    with pytest.raises(RecipeError, match=message):
        load(student, **sections)
