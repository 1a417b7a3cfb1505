"""Where a recipe writes, held against the file system without a trace."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldstill.pipeline.outputs.places import check_places, check_writable
from coldstill.pipeline.recipe.file import parse_recipe
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.runtime.errors import RecipeError


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe whose places are in a folder of the test's own; keywords change them."""

    def make(**places: str) -> Recipe:
        data: dict[str, Any] = {
            "output": "run",
            "cache": "caches",
            "teacher": {"path": str(tmp_path / "teacher")},
            "data": {"train": {"path": "a"}, "eval": {"path": "b"}},
            "student": {"path": str(tmp_path / "student")},
        }
        for key, place in {"output": "run", "cache": "caches", **places}.items():
            data[key] = place if "://" in place else str(tmp_path / place)
        return parse_recipe(data, name="r")

    return make


def check(recipe: Recipe) -> None:
    check_places(recipe, models={"teacher.path": Path(recipe.teacher.path), "student.path": Path(recipe.student.path)})


@pytest.mark.parametrize(
    ("places", "problem"),
    [
        ({"cache": "run/caches"}, r"^cache \S+/run/caches is inside output \S+/run: give each a folder of its own$"),
        ({"output": "caches/run"}, r"^output \S+/caches/run is inside cache \S+/caches: "),
        ({"cache": "run"}, r"^(output|cache) \S+/run is (output|cache) too: "),
        ({"output": "caches/../caches"}, r" too: give each a folder of its own$"),
        ({"output": "linked/run", "cache": "real"}, r"^output \S+/linked/run is inside cache \S+/real: "),
        ({"local_copy": "caches/copies"}, r"^local_copy \S+/caches/copies is inside cache "),
        ({"cache": "teacher/caches"}, r"^cache \S+ is inside teacher.path \S+/teacher, which nothing may change"),
        ({"output": "student"}, r"^output \S+/student is inside student.path \S+/student, which nothing may change"),
        ({"local_copy": "s3://a/b"}, r"^local_copy is a local folder, got s3://a/b; only cache may be a URL$"),
    ],
)
def test_places_in_each_other_or_in_a_model_are_refused(recipe: Callable[..., Recipe], tmp_path, places, problem):
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    with pytest.raises(RecipeError, match=problem):
        check(recipe(**places))


@pytest.mark.parametrize("part", ["student", "adapters", "checkpoints/checkpoint-5"])
def test_a_model_that_training_would_replace_is_refused(recipe: Callable[..., Recipe], tmp_path: Path, part: str):
    with pytest.raises(RecipeError, match="^teacher.path .* is inside output .*, where training would replace it"):
        check_places(recipe(), models={"teacher.path": tmp_path / "run" / part})
    check_places(recipe(), models={"teacher.path": tmp_path / "run" / "elsewhere"})


def test_places_side_by_side_are_right_and_nothing_is_made_of_them(recipe: Callable[..., Recipe], tmp_path: Path):
    check(recipe(local_copy="copies"))
    check(recipe(cache="memory://caches"))
    assert list(tmp_path.iterdir()) == []


def test_what_stands_in_the_way_of_a_folder_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "file/below/it", "dangling"):
        there = tmp_path / name.partition("/")[0]
        with pytest.raises(RecipeError, match=f"^output {tmp_path / name} cannot be written: {there} is no folder; "):
            check_writable("output", tmp_path / name)
    check_writable("output", tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="these are Linux's")
@pytest.mark.parametrize(("folder", "kind"), [("/proc/x/y", "proc"), ("/sys/x", "sysfs")])
def test_the_kernels_own_file_systems_take_no_folders(folder: str, kind: str):
    with pytest.raises(RecipeError, match=f"^cache {folder} cannot be written: .* is on {kind}, a file system of the"):
        check_writable("cache", Path(folder))
