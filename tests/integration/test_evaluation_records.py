"""Whose an evaluation is, where its numbers are, and what is said of a student that is not trained yet."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from coldstill.pipeline.judging.results import read_evaluation, read_results
from coldstill.pipeline.judging.similarity import block_similarity
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.report import report
from coldstill.pipeline.runtime.errors import RecipeError

Coldstill = Callable[..., Any]


@dataclass(frozen=True)
class Judged:
    """A run that is trained and judged, in a folder of the test's own."""

    recipe: Path
    output: Path

    def records(self) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in (self.output / "evaluation").iterdir()}

    def rewrite(self, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
        content = json.loads((self.output / name).read_text())
        change(content)
        (self.output / name).write_text(json.dumps(content))


@pytest.fixture
def judged(whole_run: Path, tmp_path: Path) -> Judged:
    shutil.copytree(whole_run, tmp_path / "run")
    data = yaml.safe_load((whole_run.parent / "recipe.yaml").read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**data, "output": str(tmp_path / "run")}))
    return Judged(tmp_path / "recipe.yaml", tmp_path / "run")


@pytest.mark.parametrize("without_checkpoints", [False, True])
@pytest.mark.parametrize(
    ("words", "section"),
    [
        ("loss.alpha=0.3", "loss"),
        ("train.learning_rate=0.01", "train"),
        ("projector.kind=mlp", "projector"),
        ("targets.hidden.encoding=float16", "targets"),
    ],
)
def test_words_that_did_not_train_the_run_are_refused_by_every_command_in_the_same_line(
    coldstill: Coldstill, judged: Judged, words: str, section: str, without_checkpoints: bool
):
    if without_checkpoints:
        shutil.rmtree(judged.output / "checkpoints")
    before = judged.records()
    lines = {command: coldstill(command, judged.recipe, words, expect=2).stderr for command in ("evaluate", "advise")}
    assert f"{judged.output} holds a run of another recipe ({section} differ; see {judged.output}/" in lines["evaluate"]
    with pytest.raises(RecipeError) as refused:
        block_similarity(load_recipe(judged.recipe, [words]), {})
    key, _, value = words.partition("=")
    data = yaml.safe_load(judged.recipe.read_text())
    outer, *inner = key.split(".")
    changed = data.setdefault(outer, {})
    for part in inner[:-1]:
        changed = changed.setdefault(part, {})
    changed[inner[-1]] = yaml.safe_load(value)
    judged.recipe.write_text(yaml.safe_dump(data))
    lines["report"] = coldstill("report", judged.recipe, expect=2).stderr
    lines["push"] = coldstill("report", judged.recipe, "--push", "a/b", expect=2).stderr
    lines["similarity"] = f"coldstill: {refused.value}\n"
    if words != "targets.hidden.encoding=float16":  # which training asks the store for first
        lines["train"] = coldstill("train", judged.recipe, expect=2).stderr
    assert set(lines.values()) == {lines["evaluate"]}
    assert judged.records() == before


@pytest.mark.parametrize(
    ("words", "section"),
    [("data.eval.max_rows=5", "data"), ("data.train.max_rows=12", "data"), ("teacher.dtype=bfloat16", "teacher")],
)
def test_other_rows_or_another_teacher_than_the_runs_are_refused_before_they_are_looked_for(
    coldstill: Coldstill, judged: Judged, words: str, section: str
):
    before = judged.records()
    for command in ("evaluate", "advise"):
        line = coldstill(command, judged.recipe, words, expect=2).stderr
        assert f"holds a run of another recipe ({section} differ; " in line
    assert judged.records() == before


def test_what_decides_nothing_of_the_student_stays_free(coldstill: Coldstill, judged: Judged):
    before = json.loads((judged.output / "evaluation/results.json").read_text())
    words = ("evaluate.batch_size=2", "train.logging_steps=7", "teacher.batch_size=3")
    printed = coldstill("evaluate", judged.recipe, *words).stdout
    assert before["gap_closed"]["loss"] is None, "two random models are equally bad, within the error of six rows"
    assert "no gap" in printed
    assert "no gap: pruning left the student no worse than the teacher by more than the error" in printed
    assert "is not judged" not in printed
    assert json.loads((judged.output / "evaluation/results.json").read_text())["models"] == before["models"]


def test_before_training_there_is_no_run_that_could_be_another(coldstill: Coldstill, judged: Judged, tmp_path: Path):
    words = (f"output={tmp_path}/untrained", "loss.alpha=0.3")
    result = coldstill("evaluate", judged.recipe, *words)
    assert "recovered is not judged: it is not trained yet; run: coldstill train" in result.stdout
    found = json.loads((tmp_path / "untrained/evaluation/results.json").read_text())
    assert list(found["models"]) == ["teacher", "pruned"]
    assert found["missing"] == {"recovered": "it is not trained yet; run: coldstill train"}
    assert found["gaps"]["kl"]["value"] == pytest.approx(found["models"]["pruned"]["kl"])


def test_a_run_that_is_not_at_its_end_says_how_far_it_is(coldstill: Coldstill, judged: Judged):
    (judged.output / "train.json").unlink()
    shutil.rmtree(judged.output / "student")
    early = coldstill("evaluate", judged.recipe).stdout
    assert "recovered is not judged: training has saved no checkpoint yet; run: coldstill train" in early
    checkpoint = judged.output / "checkpoints/checkpoint-5"
    checkpoint.mkdir()
    (checkpoint / "scheduler.pt").touch()
    (checkpoint / "trainer_state.json").write_text(json.dumps({"max_steps": 8}))
    late = json.loads(coldstill("evaluate", judged.recipe, "--json").stdout)
    assert late["missing"] == {"recovered": "training is at step 5 of 8; run: coldstill train"}


def test_numbers_are_in_results_json_and_how_they_were_made_in_provenance_json(coldstill: Coldstill, judged: Judged):
    printed = json.loads(coldstill("evaluate", judged.recipe, "--json").stdout)
    assert json.loads((judged.output / "evaluation/results.json").read_text()) == printed
    assert printed["num_rows"] == 6
    record = json.loads((judged.output / "evaluation/provenance.json").read_text())
    claimed = json.loads((judged.output / "checkpoints/provenance.json").read_text())
    assert record["run"] == claimed["run"]
    assert "evaluation" not in record


def test_an_evaluation_by_an_earlier_version_is_read_and_its_gaps_are_judged_by_their_values(
    coldstill: Coldstill, judged: Judged
):
    found = read_results(judged.output)
    assert found is not None
    earlier = {
        name: copy.deepcopy(found[name]) for name in ("models", "gap_closed", "num_tokens", "tasks", "task_average")
    }
    for name, perplexity in (("teacher", 138.76), ("pruned", 135.21), ("recovered", 123.02)):
        earlier["models"][name]["perplexity"] = perplexity
        earlier["models"][name]["loss"] = perplexity / 30
    earlier["gap_closed"]["perplexity"] = -3.434
    (judged.output / "evaluation/results.json").unlink()
    judged.rewrite("evaluation/provenance.json", lambda record: record.update(evaluation=earlier))
    judged.rewrite("evaluation/provenance.json", lambda record: record.pop("run"))
    again = read_evaluation(load_recipe(judged.recipe))
    assert again is not None
    assert again["gap_closed"]["perplexity"] is again["gap_closed"]["loss"] is None
    assert again["gap_closed"]["kl"] == pytest.approx(found["gap_closed"]["kl"])
    assert again["models"]["recovered"]["perplexity"] == 123.02
    assert "perplexity 123.02" in coldstill("advise", judged.recipe).stdout
    written = report(judged.output, show_progress=False)
    page = Path(written.page).read_text()
    assert "-343.4%" not in page
    assert "no gap" in page
    assert "No gap: pruning left the student no worse than the teacher" in page
    coldstill("evaluate", judged.recipe)
    assert "evaluation" not in json.loads((judged.output / "evaluation/provenance.json").read_text())
    assert read_results(judged.output) == found


def test_an_evaluation_of_another_run_counts_as_none_even_of_the_same_second(judged: Judged):
    recipe = load_recipe(judged.recipe)
    assert read_evaluation(recipe) is not None
    judged.rewrite("evaluation/provenance.json", lambda record: record["run"]["loss"].update(alpha=0.9))
    assert read_evaluation(recipe) is None


@pytest.mark.parametrize("name", ["results.json", "provenance.json"])
def test_a_damaged_evaluation_is_one_line(coldstill: Coldstill, judged: Judged, name: str):
    (judged.output / "evaluation" / name).write_text('{"models": ')
    (line,) = coldstill("advise", judged.recipe, expect=2).stderr.splitlines()
    assert f"evaluation/{name} is damaged" in line
    assert line.endswith("run: coldstill evaluate")
    coldstill("evaluate", judged.recipe)
    coldstill("advise", judged.recipe)
