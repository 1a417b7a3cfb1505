"""What leads from a recipe to what was made for it: keys that later versions keep, so that stores are found again."""

from typing import Any

import pytest

from coldstill.cache.identity import digest_of
from coldstill.pipeline.outputs.run_index import rows_key
from coldstill.pipeline.recipe.file import parse_recipe
from coldstill.pipeline.recipe.sections import Recipe


def recipe_of(*, prompt_weight: float = 0.0, **train: Any) -> Recipe:
    data = {
        "packing": False,
        "prompt_weight": prompt_weight,
        "train": {"path": "text", "data_files": "train.txt", "max_rows": 20, **train},
        "eval": {"path": "json", "data_files": ["eval.jsonl"], "prompt_column": "question"},
    }
    student = {"prune": {"layers": {"remove": 2}}}
    whole = {"output": "runs/x", "teacher": {"path": "somewhere"}, "data": data, "student": student}
    return parse_recipe(whole, name="test")


def test_the_rows_of_a_recipe_are_found_where_the_first_version_put_them():
    assert digest_of(rows_key(recipe_of())) == "69ff130e60781f352a64915bf253332f7ece339ff84cd6ed9e2387fbd3a0e8ea"
    # What a selection says of its source is part of its name.
    source = recipe_of().data.train.identity()
    assert digest_of(source) == "11f2004558c79c6fe59f8eaad65d636f9023b3f06660001050a70dd3096c83c1"


@pytest.mark.parametrize(
    "change", [{"skip_null": True}, {"max_rows": 21}, {"split": "test"}, {"prompt_weight": 0.5}], ids=str
)
def test_what_changes_the_rows_leads_elsewhere(change):
    assert digest_of(rows_key(recipe_of(**change))) != digest_of(rows_key(recipe_of()))


def test_the_weight_of_prompts_leads_nowhere_else_where_there_are_no_prompts():
    recipe = recipe_of(prompt_weight=0.5)
    unasked = recipe.data.model_copy(update={"eval": recipe.data.eval.model_copy(update={"prompt_column": None})})
    assert unasked.identity() == unasked.model_copy(update={"prompt_weight": 0.0}).identity()
    assert recipe.data.identity()["prompt_weight"] == 0.5
