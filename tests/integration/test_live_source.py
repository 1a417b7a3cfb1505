"""`targets.source: live`: the teacher beside the student, as the reference and for who has the memory."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

LEARNED = {"alpha": 0.5, "beta": 0.5, "gamma": 0.1, "delta": 0.05, "temperature": 2.0}
EXACT = {"logits": {"kind": "final", "encoding": "float32"}, "hidden": {"encoding": "float32"}}


def student_of(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def test_a_live_teacher_trains_the_student_that_its_exact_store_trains(
    write_recipe: Callable[..., Path], coldstill: Callable[..., Any], workplace: Path
):
    recipe = write_recipe(targets=EXACT, loss=LEARNED)
    coldstill("precompute", recipe)
    stored = json.loads(coldstill("train", recipe, "--json").stdout)
    # Whether there is a store or none, nothing of it is read or written.
    shutil.rmtree(workplace / "caches/stores")
    live = json.loads(coldstill("train", recipe, "targets.source=live", f"output={workplace}/live", "--json").stdout)
    assert not (workplace / "caches/stores").exists()
    assert live["losses"].keys() == stored["losses"].keys()
    for name, value in stored["losses"].items():
        assert live["losses"][name] == pytest.approx(value, rel=1e-5), name
    trained = student_of(live["student"])
    for name, values in student_of(stored["student"]).items():
        torch.testing.assert_close(trained[name], values, rtol=1e-4, atol=1e-5)


def test_a_live_run_makes_its_student_trains_it_and_judges_it_without_a_store(
    write_recipe: Callable[..., Path], coldstill: Callable[..., Any], workplace: Path
):
    recipe = write_recipe(targets={"source": "live", "logits": {"kind": "none"}}, loss=LEARNED, data__packing=False)
    result = coldstill("train", recipe, "--json")
    assert "targets.source is live: the teacher stays in memory beside the student" in result.stderr
    assert "targets.logits.kind has no effect: source is live, and nothing is stored" in result.stderr
    assert json.loads(result.stdout)["trained_steps"] == 4
    assert "complete already" in coldstill("train", recipe).stdout
    live = json.loads(coldstill("evaluate", recipe, "--json").stdout)
    assert not (workplace / "caches/stores").exists()
    coldstill("precompute", recipe, "targets={source: stored}")
    stored = json.loads(
        coldstill("evaluate", recipe, "targets={source: stored}", f"output={workplace}/other", "--json").stdout
    )
    for model in ("teacher", "pruned"):
        for measure in ("loss", "kl", "agreement"):
            assert live["models"][model][measure] == pytest.approx(stored["models"][model][measure], abs=2e-3)
    assert live["models"]["recovered"]["kl"] > 0


@pytest.mark.parametrize("command", [["precompute"], ["precompute", "--dry-run"], ["plan"]])
def test_there_is_no_stage_one_without_a_store(
    write_recipe: Callable[..., Path], coldstill: Callable[..., Any], command: list[str]
):
    recipe = write_recipe(targets={"source": "live"})
    said = coldstill(command[0], recipe, *command[1:], expect=2).stderr
    assert "is live, so nothing is stored of its teacher: run coldstill train, or set targets.source=stored" in said
