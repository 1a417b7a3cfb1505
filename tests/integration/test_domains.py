"""Eval rows of several sources: read, judged and logged together, and by source; of one source all is as it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldstill.cache.reader import Reader
from coldstill.pipeline.estimates.trial import trial_of
from coldstill.pipeline.evaluate import Evaluation, evaluate
from coldstill.pipeline.outputs.run_index import find_run_rows, rows_key
from coldstill.pipeline.precompute import precompute
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.report import report
from coldstill.pipeline.sweeps.keys import sweep_key
from coldstill.pipeline.train import train

MEASURES = ("loss", "kl", "agreement")


@pytest.fixture
def sources(workplace: Path, corpus: list[str]) -> list[dict[str, Any]]:
    """The source that train reads too, and another one."""
    (workplace / "other.txt").write_text("\n".join(corpus[150:200]))
    own = {"path": "text", "data_files": str(workplace / "text.txt"), "max_rows": 5}
    return [own, {"path": "text", "data_files": str(workplace / "other.txt"), "max_rows": 3, "label": "elsewhere"}]


@pytest.fixture
def of_two(write_recipe: Callable[..., Path], sources: list[dict[str, Any]]) -> Callable[..., Recipe]:
    """Recipes whose eval rows are of both sources; changes as `write_recipe` takes them."""

    def recipe(**changes: Any) -> Recipe:
        return load_recipe(write_recipe(data__eval=sources, **changes))

    return recipe


def eval_tokens(recipe: Recipe) -> list[list[int]]:
    run = find_run_rows(recipe)
    reader = Reader(run.store, run.selections["eval"], ["tokens"])
    return [reader.row(index)["tokens"]["ids"].tolist() for index in range(len(reader))]


def test_each_source_is_judged_as_if_it_were_the_only_one_and_all_together(
    of_two: Callable[..., Recipe], write_recipe: Callable[..., Path], sources: list[dict[str, Any]], workplace: Path
):
    both = of_two()
    precompute(both, show_progress=False)
    train(both)
    judged = evaluate(both, show_progress=False)
    assert list(judged.domains) == ["text", "elsewhere"]
    assert [domain.num_rows for domain in judged.domains.values()] == [5, 3]
    assert judged.num_rows == 8
    assert judged.num_tokens == sum(domain.num_tokens for domain in judged.domains.values()) == 8 * 23
    for model, quality in judged.models.items():
        for measure in MEASURES:
            parts = [getattr(domain.models[model], measure) * domain.num_tokens for domain in judged.domains.values()]
            assert getattr(quality, measure) == pytest.approx(sum(parts) / judged.num_tokens, rel=1e-9, abs=1e-12)
    results = json.loads((Path(both.output) / "evaluation/results.json").read_text())
    assert (
        results["domains"]["elsewhere"]["models"]["recovered"]["kl"]
        == judged.domains["elsewhere"].models["recovered"].kl
    )
    tokens = eval_tokens(both)
    for source, domain, rows in zip(sources, judged.domains.values(), (tokens[:5], tokens[5:]), strict=True):
        alone = {key: value for key, value in source.items() if key != "label"}
        single = load_recipe(write_recipe(data__eval=alone, output=str(workplace / domain_name(source))))
        precompute(single, show_progress=False)
        assert eval_tokens(single) == rows
        check_same(evaluate(single, show_progress=False), domain)


def domain_name(source: dict[str, Any]) -> str:
    return Path(source["data_files"]).stem


def check_same(single: Evaluation, domain: Any) -> None:
    assert single.domains == {}
    assert single.models["teacher"] == domain.models["teacher"]
    assert single.models["pruned"].kl == pytest.approx(domain.models["pruned"].kl, rel=1e-4)
    assert single.gaps["kl"].value == pytest.approx(domain.gaps["kl"].value, rel=1e-4)
    assert single.gaps["kl"].stderr == pytest.approx(domain.gaps["kl"].stderr, rel=1e-3)


def test_training_logs_the_losses_of_each_source_and_over_all_rows(of_two: Callable[..., Recipe]):
    recipe = of_two(train__eval_strategy="epoch", train__per_device_eval_batch_size=2, train__max_steps=2)
    precompute(recipe, show_progress=False)
    train(recipe)
    log = json.loads((Path(recipe.output) / "train.json").read_text())["log"]
    logged = {key: value for entry in log for key, value in entry.items()}
    for name in ("loss", "loss_task", "loss_logits", "loss_hidden"):
        own, other = logged[f"eval_text_{name}"], logged[f"eval_elsewhere_{name}"]
        assert own != other
        # The Trainer's own loss is in float32.
        assert logged[f"eval_{name}"] == pytest.approx((5 * own + 3 * other) / 8, rel=1e-6)


def test_the_best_step_may_be_the_best_on_one_source(of_two: Callable[..., Recipe]):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 4}
    recipe = of_two(train={**best, "metric_for_best_model": "elsewhere_loss_logits"})
    precompute(recipe, show_progress=False)
    summary = train(recipe)
    log = json.loads((Path(recipe.output) / "train.json").read_text())["log"]
    judged = {entry["eval_elsewhere_loss_logits"]: entry["step"] for entry in log if "eval_elsewhere_loss" in entry}
    assert summary.exported_step == judged[min(judged)]


def test_commands_show_each_source(
    of_two: Callable[..., Recipe], write_recipe: Callable[..., Path], sources: list[dict[str, Any]], coldstill: Any
):
    recipe = write_recipe(data__eval=sources, train__eval_strategy="epoch")
    coldstill("precompute", recipe)
    assert "text, train; text, train" in coldstill("cache", "info", f"{recipe.parent}/caches").stdout
    coldstill("train", recipe)
    shown = coldstill("evaluate", recipe).stdout
    for title in (
        "Held-out text, 184 tokens",
        "Held-out text of text, 115 tokens",
        "Held-out text of elsewhere, 69 tokens",
    ):
        assert title in shown
    assert shown.count("gap closed") >= 3
    page = Path(report(recipe.parent / "run", show_progress=False).page).read_text()
    assert "Held-out text of elsewhere, 69 tokens" in page
    figures = recipe.parent / "run/report/figures"
    assert "elsewhere" in (figures / "divergence-over-epochs.svg").read_text()


def test_a_live_teacher_judges_each_source_too(of_two: Callable[..., Recipe]):
    recipe = of_two(targets={"source": "live"}, train__max_steps=1, train__eval_strategy="steps", train__eval_steps=1)
    train(recipe)
    assert [domain.num_rows for domain in evaluate(recipe, show_progress=False).domains.values()] == [5, 3]


def test_a_trial_takes_a_few_rows_of_each_source(of_two: Callable[..., Recipe]):
    with trial_of(of_two(train__keep="best"), num_rows=8, show_progress=False) as trial:
        assert {label: len(rows) for label, rows in trial.run.domains("eval").items()} == {"text": 2, "elsewhere": 2}
        assert trial.recipe.kept_by is None


def test_a_list_of_one_has_the_rows_of_its_source_and_a_key_of_its_own(
    write_recipe: Callable[..., Path], sources: list[dict[str, Any]]
):
    mapped, listed = (load_recipe(write_recipe(data__eval=given)) for given in (sources[0], sources[:1]))
    assert rows_key(mapped)["data"]["eval"] == {**rows_key(mapped)["data"]["train"], "max_rows": 5}
    assert "label" not in rows_key(mapped)["data"]["eval"]
    assert rows_key(mapped) != rows_key(listed)
    assert sweep_key(mapped) != sweep_key(listed)
    precompute(mapped, listed, show_progress=False)
    assert eval_tokens(mapped) == eval_tokens(listed)
    provenances = [find_run_rows(recipe).selections["eval"].provenance for recipe in (mapped, listed)]
    assert sorted(provenances[0]) == ["num_documents", "num_shared", "source", "tokenizer"]
    assert provenances[1]["domains"] == [{"label": "text", "num_rows": 5}]
    assert provenances[1]["source"] == {"sources": [{**provenances[0]["source"], "label": None}]}
