"""A plan's bytes and memory are what then happens, nothing is written for it, and a run that cannot fit is refused."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import Forks

from coldstill.cache.local_objects import LocalObjects
from coldstill.cache.manifest import Manifest
from coldstill.cache.store import CONSTANTS
from coldstill.pipeline.outputs.run_index import find_run_rows
from coldstill.pipeline.recipe.file import load_recipe

FINAL = {"logits": {"kind": "final"}, "hidden": {"encoding": "coded"}}


@pytest.fixture(autouse=True)
def _forked(forks: Forks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a plan train its few steps in a process that need not import anything."""
    monkeypatch.setattr("coldstill.pipeline.runtime.program.PROGRAM", forks.program("coldstill.cli"))


def planned(coldstill: Callable[..., Any], recipe: Path, *arguments: str) -> dict[str, Any]:
    return json.loads(coldstill("plan", recipe, "--json", *arguments).stdout)


def test_a_plan_says_what_then_happens(
    forks: Forks, write_recipe: Callable[..., Path], coldstill: Callable[..., Any], workplace: Path
):
    recipe = write_recipe(targets=FINAL, data__train__max_rows=400)
    before = sorted(workplace.rglob("*"))
    plan = planned(coldstill, recipe, "--rows", "100", "--budget", "3MB")
    assert sorted(workplace.rglob("*")) == before, "a plan leaves something behind"
    check_kinds(plan["kinds"])
    check_proposals(plan)
    coldstill("precompute", recipe)
    run = find_run_rows(load_recipe(recipe))
    records = list(Manifest(run.store).records())
    assert plan["missing_bytes"] == pytest.approx(sum(record.stored_bytes for record in records), rel=0.1)
    constants = sum(record.stored_bytes for record in records if record.shard == CONSTANTS)
    assert plan["constant_bytes"] == pytest.approx(constants, rel=0.01)
    assert plan["num_tokens"] == sum(selection.num_tokens for selection in run.selections.values())
    trained = trained_in_a_process(forks, recipe)
    assert plan["train_memory_bytes"] == pytest.approx(trained["peak_memory_bytes"], rel=0.25)


def check_kinds(kinds: list[dict[str, Any]]) -> None:
    assert [kind["is_chosen"] for kind in kinds].count(True) == 1
    cosines = [kind["fidelity"]["grad_cosine"] for kind in kinds]
    assert cosines == sorted(cosines, reverse=True)
    coded = {kind["setting"].rpartition("=")[2]: kind for kind in kinds if "encoding=coded" in kind["setting"]}
    finest, coarsest = coded["0.02"], coded["0.08"]
    assert 0 < finest["fidelity"]["kl"] < coarsest["fidelity"]["kl"]
    assert finest["bytes_per_token"] > coarsest["bytes_per_token"]
    assert finest["fidelity"]["grad_cosine"] > 0.999
    top = next(kind["fidelity"] for kind in kinds if "kind=topk " in kind["setting"])
    assert 0 < top["stored_mass"] < 1


def check_proposals(plan: dict[str, Any]) -> None:
    assert plan["proposals"]
    for proposal in plan["proposals"]:
        assert proposal["total_bytes"] + plan["constant_bytes"] <= plan["budget_bytes"] == 3_000_000
        assert "targets.logits.kind=" in proposal["overrides"]


def trained_in_a_process(forks: Forks, recipe: Path) -> dict[str, Any]:
    """Train in a process that has done nothing else: the memory of this test's own would count otherwise."""
    command = forks.command("coldstill.cli", "train", recipe, "--json")
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_the_tables_of_a_plan_and_a_budget_that_is_too_small(
    write_recipe: Callable[..., Path], coldstill: Callable[..., Any]
):
    recipe = write_recipe(targets__logits={"kind": "final", "encoding": "float32"})
    coldstill("precompute", recipe)
    output = coldstill("plan", recipe, "--budget", "1kB").output
    assert "stage one  nothing: all columns are complete" in output
    assert "GB of memory" in output or "MB of memory" in output
    # The exact kind gives live distillation's gradient, and is marked as the recipe's own.
    exact = next(line for line in output.splitlines() if "kind=final encoding=float32 *" in line)
    assert exact.split()[-3:] == ["0.0000", "1.0000", "1.000"]
    assert "kind=topk_sampled k=32 samples=32" in output
    assert "Nothing fits 1.0 kB; this is the smallest, take fewer rows" in output


@pytest.mark.parametrize("size", ["lots", "-3GB", "0", "5 parsecs"])
def test_a_budget_that_is_no_size_is_refused(
    write_recipe: Callable[..., Path], coldstill: Callable[..., Any], size: str
):
    result = coldstill("plan", write_recipe(), f"--budget={size}", expect=2)
    assert f"--budget '{size}' is no size; expected" in result.stderr


def test_a_run_that_cannot_fit_is_refused_before_the_teacher_reads_a_row(
    write_recipe: Callable[..., Path], coldstill: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    recipe = write_recipe()
    monkeypatch.setattr(LocalObjects, "free_bytes", lambda _self: 1000)
    result = coldstill("precompute", recipe, expect=2)
    assert "precompute needs 0.0 GB more" in result.stderr
    assert "0.0 GB free; store fewer blocks or rows, or see: coldstill plan" in result.stderr
    run = find_run_rows(load_recipe(recipe))
    assert "label_logit" not in Manifest(run.store).columns()
