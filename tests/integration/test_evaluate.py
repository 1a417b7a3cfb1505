"""An evaluation from the store against the teacher itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from coldstill.cache.reader import Reader
from coldstill.pipeline.evaluate import evaluate
from coldstill.pipeline.models import load_model
from coldstill.pipeline.outputs.run_index import find_run_rows
from coldstill.pipeline.precompute import precompute
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.students.folders import find_student


@pytest.mark.parametrize("packing", [True, False])
def test_loss_kl_and_agreement_are_those_of_the_live_teacher(write_recipe: Callable[..., Path], packing: bool):
    recipe = load_recipe(write_recipe(data__packing=packing, data__sequence_length=24 if packing else 60))
    precompute(recipe, show_progress=False)
    result = evaluate(recipe, show_progress=False)
    run = find_run_rows(recipe)
    reader = Reader(run.store, run.selections["eval"], ["tokens"])
    teacher = AutoModelForCausalLM.from_pretrained(recipe.teacher.path, dtype=torch.float32)
    pruned = AutoModelForCausalLM.from_pretrained(find_student(recipe), dtype=torch.float32)
    sums = torch.zeros(4)
    count = 0
    for index in range(len(reader)):
        ids = torch.from_numpy(reader.row(index)["tokens"]["ids"].astype("int64"))
        with torch.no_grad():
            want, got = (model(input_ids=ids.unsqueeze(0)).logits[0, :-1] for model in (teacher, pruned))
        sums[0] += F.cross_entropy(want, ids[1:], reduction="sum")
        sums[1] += F.cross_entropy(got, ids[1:], reduction="sum")
        sums[2] += F.kl_div(got.log_softmax(-1), want.log_softmax(-1), log_target=True, reduction="sum")
        sums[3] += (got.argmax(-1) == want.argmax(-1)).sum()
        count += len(ids) - 1
    teacher_loss, pruned_loss, kl, agreement = (sums / count).tolist()
    assert result.num_tokens == count
    assert result.models["teacher"].loss == pytest.approx(teacher_loss, rel=1e-5)
    assert result.models["pruned"].loss == pytest.approx(pruned_loss, rel=1e-5)
    assert result.models["pruned"].kl == pytest.approx(kl, rel=5e-3)
    assert result.models["pruned"].agreement == pytest.approx(agreement, abs=0.01)


def test_a_student_is_judged_once_for_all_runs_that_share_it(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    loaded: list[str] = []

    def counting(folder: Path, **options: Any) -> Any:
        loaded.append(folder.name)
        return load_model(folder, **options)

    monkeypatch.setattr("coldstill.pipeline.judging.eval_rows.load_model", counting)
    recipe = write_recipe()
    coldstill("precompute", recipe)
    coldstill("train", recipe)
    first = json.loads(coldstill("evaluate", recipe, "--json").stdout)
    assert len(loaded) == 2
    assert json.loads(coldstill("evaluate", recipe, "--json").stdout) == first
    other = (f"output={recipe.parent}/other", "train.seed=7")
    coldstill("train", recipe, *other)
    second = json.loads(coldstill("evaluate", recipe, *other, "--json").stdout)
    assert loaded[2:] == ["student"]
    assert second["models"]["pruned"] == first["models"]["pruned"]
    assert second["models"]["recovered"] != first["models"]["recovered"]
    fewer_rows = (f"output={recipe.parent}/fewer", "data.eval.max_rows=5")
    coldstill("precompute", recipe, *fewer_rows)
    coldstill("train", recipe, *fewer_rows)
    coldstill("evaluate", recipe, *fewer_rows)
    assert len(loaded) == 5
