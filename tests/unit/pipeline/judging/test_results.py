"""What an evaluation's numbers say in words, and evaluations as earlier versions wrote them."""

import json
from pathlib import Path
from typing import Any

import pytest

from coldstill.pipeline.judging.results import (
    Retention,
    describe_results,
    read_results,
    retention_of,
    what_is_worse,
)
from coldstill.pipeline.runtime.errors import RecipeError

TEACHER = {"loss": 3.0, "perplexity": 20.0, "kl": 0.0, "agreement": 1.0}
PRUNED = {"loss": 5.0, "perplexity": 150.0, "kl": 1.0, "agreement": 0.4}
RECOVERED = {"loss": 4.0, "perplexity": 55.0, "kl": 0.25, "agreement": 0.7}


def evaluation(**changes: Any) -> dict[str, Any]:
    """An evaluation without tasks; changes are of the recovered student."""
    return {
        "models": {"teacher": TEACHER, "pruned": PRUNED, "recovered": {**RECOVERED, **changes}},
        "gap_closed": {"kl": 0.75},
        "gains": {},
        "gaps": {},
        "task_average": None,
    }


def with_tasks(before: float, after: float, stderr: float = 0.01) -> dict[str, Any]:
    shares = {"pruned": {"value": before, "stderr": stderr}, "recovered": {"value": after, "stderr": stderr}}
    return {**evaluation(), "task_average": {"retention": shares, "gap_closed": None}}


def test_retention_is_that_on_tasks_and_without_them_agreement_stands_in():
    assert retention_of(with_tasks(0.6, 0.9)) == Retention(0.9, 0.01, "tasks")
    assert retention_of(evaluation()) == Retention(0.7, None, "agreement")


def test_results_are_one_line_that_compares_with_the_teacher_and_with_before():
    assert describe_results(evaluation()) == (
        "perplexity 55.00 (teacher 20.00, pruned 150.00), KL to the teacher 0.250 (pruned 1.000, 75.0% of the gap "
        "closed), agreement 70.0% (pruned 40.0%)"
    )
    assert "no gap to close" in describe_results({**evaluation(), "gap_closed": {"kl": None}})


@pytest.mark.parametrize(
    ("found", "worse"),
    [
        (evaluation(), None),
        (evaluation(perplexity=160.0), "perplexity rose from 150.00 to 160.00"),
        (evaluation(perplexity=160.0, kl=1.0), None),  # it came no nearer to the teacher at all
        (with_tasks(0.8, 0.7), "retention fell from 80.0% to 70.0%"),
        (with_tasks(0.8, 0.79), None),  # within its error
        (with_tasks(1.2, 1.1), None),  # back towards the teacher
    ],
    ids=["nothing", "perplexity", "no nearer", "tasks", "within the error", "beyond the teacher"],
)
def test_what_training_made_worse_is_said_where_it_brought_the_student_nearer(found: dict[str, Any], worse: str | None):
    assert what_is_worse(found) == worse


def test_a_rise_of_the_perplexity_within_its_error_is_none():
    rise = {**evaluation(perplexity=160.0), "gains": {"perplexity": {"value": -10.0, "stderr": 8.0}}}
    assert what_is_worse(rise) is None
    assert what_is_worse({**rise, "gains": {"perplexity": {"value": -10.0, "stderr": 2.0}}}) is not None


def write(output: Path, name: str, content: Any) -> None:
    (output / "evaluation").mkdir(parents=True, exist_ok=True)
    (output / "evaluation" / name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_results_are_there_once_their_record_is(tmp_path: Path):
    assert read_results(tmp_path) is None
    write(tmp_path, "results.json", evaluation())
    assert read_results(tmp_path) is None, "the record is written last"
    write(tmp_path, "provenance.json", {"store": "s"})
    assert read_results(tmp_path) == evaluation()


def test_results_of_an_earlier_version_are_in_the_record_and_get_their_gaps(tmp_path: Path):
    models = evaluation()["models"]
    earlier = {"models": models, "gap_closed": {"kl": 0.1}, "task_average": None}
    write(tmp_path, "provenance.json", {"evaluation": earlier})
    found = read_results(tmp_path)
    assert found is not None
    assert found["gaps"]["kl"] == {"value": 1.0, "stderr": None}
    assert found["gaps"]["agreement"]["value"] == pytest.approx(0.6)
    assert found["gap_closed"] == pytest.approx({"loss": 0.5, "perplexity": 95 / 130, "kl": 0.75, "agreement": 0.5})
    assert (found["gains"], found["missing"]) == ({}, {})


def test_a_damaged_file_is_one_line_that_says_what_to_run(tmp_path: Path):
    write(tmp_path, "provenance.json", "{")
    with pytest.raises(RecipeError, match=r"provenance\.json is damaged: .*; run: coldstill evaluate$"):
        read_results(tmp_path)
