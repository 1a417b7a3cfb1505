"""A store that an earlier version wrote: opened, checked, trained from and judged by; nothing is computed again."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldstill.cache.inventory import list_stores
from coldstill.cache.manifest import Manifest
from coldstill.cache.reader import Reader
from coldstill.cache.spans import Span
from coldstill.cache.store import open_store, store_path
from coldstill.pipeline.outputs.run_index import find_run_rows
from coldstill.pipeline.recipe.file import load_recipe

RECIPES = ("final", "topk", "topk_sampled")
Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the store with the recipes, texts and teacher that it was made of; the test runs there."""
    copy = tmp_path / "format3"
    shutil.copytree(Path(__file__).parents[1] / "stores" / "format3", copy)
    monkeypatch.chdir(copy)
    return copy


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_byte_of_an_old_store_is_sound_and_every_column_is_what_its_teacher_says(coldstill: Run):
    answer = json.loads(coldstill("cache", "verify", "--live", 8, "--json").stdout)
    assert answer["is_clean"]
    assert (answer["live"]["is_within"], answer["live"]["unchecked"]) == (True, [])


def test_precompute_of_an_old_stores_recipes_computes_nothing_and_changes_no_file(coldstill: Run, folder: Path):
    before = digests(folder / "caches")
    files = [f"{name}.yaml" for name in RECIPES]
    summary = json.loads(coldstill("precompute", *files, "--json").stdout)
    assert (summary["computed_tokens"], summary["written_bytes"], summary["teacher_was_loaded"]) == (0, 0, False)
    after = digests(folder / "caches")
    # By the words for "not reconstructed", which is what the recipes meant when they were written without any; and
    # rows, which earlier versions did not keep.
    assert all(file.startswith(("index/student-", "rows/")) for file in after.keys() - before.keys())
    assert {file: after[file] for file in before} == before


@pytest.mark.parametrize("name", RECIPES)
def test_an_old_store_trains_a_student_and_judges_it(coldstill: Run, name: str):
    coldstill("precompute", f"{name}.yaml")
    shutil.rmtree("teacher")
    summary = json.loads(coldstill("train", f"{name}.yaml", "--json").stdout)
    assert summary["num_steps"] == 4
    assert {"loss", "loss_task", "loss_logits", "loss_hidden"} <= summary["losses"].keys()
    judged = json.loads(coldstill("evaluate", f"{name}.yaml", "--json").stdout)
    assert judged["models"].keys() == {"teacher", "pruned", "recovered"}


def test_the_prompts_of_an_old_store_are_where_its_text_has_them():
    recipe = load_recipe(Path("topk.yaml"))
    run = find_run_rows(recipe)
    lines = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    assert [bool(spans) for spans in run.selections["train"].spans] == [bool(line["question"]) for line in lines]
    found = [(Span(0, length, 0.0),) if length else () for length in (5, 8, 0, 13, 12)]
    assert list(run.selections["eval"].spans) == found
    assert run.selections["eval"].labels.shape == (5, 0)
    assert len(Reader(run.store, run.selections["train"], ["tokens"])) == len(lines) == 14


def test_an_old_store_shows_what_it_has(coldstill: Run):
    (described,) = json.loads(coldstill("cache", "info", "--json").stdout)
    store = open_store(store_path("caches", *list_stores("caches")))
    columns = Manifest(store).columns()
    assert {column["name"] for column in described["columns"]} == set(columns)
    kinds = (
        "logits/topk/8/delta",
        "logits/tail/8_4/1_2",
        "logits/final/coded_0.03",
        "hidden/0/int8",
        "hidden/0/coded_0.2",
    )
    assert {*kinds, "hidden/0/coded_0.2_sampled_0.5", "output_head", "calibration/logits/final"} <= set(columns)
    assert {len(find_run_rows(load_recipe(Path(f"{name}.yaml"))).selections) for name in RECIPES} == {2}
    assert len(described["selections"]) == 4
