"""The card beside an exported student: built from records, with the numbers of the last evaluation, sent to the hub."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub import Hub
from huggingface_hub import ModelCard

from coldstill.cache.kept_folders import CHECKSUMS
from coldstill.pipeline.judging.results import RESULTS_FILE
from coldstill.pipeline.outputs.run_index import find_run_rows
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.stage_two.model_card import has_numbers, update_card
from coldstill.pipeline.students.folders import find_student, write_checksums
from coldstill.pipeline.students.pruning_record import PRUNING_FILE

CUT = {
    "parameters": {"teacher": 56000, "student": 44800},
    "blocks": {"teacher": 4, "student": 3, "kept": [0, 1, 2]},
    "mlp": {"teacher": None, "student": None},
    "hidden": {"teacher": 32, "student": 32},
    "reconstructed": True,
}
TASKS = {
    "tasks": {
        "arc_easy": {
            "metric": "acc_norm",
            "higher_is_better": True,
            "num_samples": 200,
            "models": {
                "teacher": {"value": 0.6, "stderr": 0.03},
                "pruned": {"value": 0.4, "stderr": 0.031},
                "recovered": {"value": 0.55, "stderr": None},
            },
            "retention": {"pruned": {"value": 0.667, "stderr": 0.05}, "recovered": {"value": 0.917, "stderr": 0.04}},
            "gap_closed": {"value": 0.75, "stderr": 0.2},
        },
        "lambada": {
            "metric": "perplexity",
            "higher_is_better": False,
            "num_samples": 100,
            "models": {
                "teacher": {"value": 20.0, "stderr": 1.0},
                "pruned": {"value": 1200.0, "stderr": 50.0},
                "recovered": {"value": 30.5, "stderr": 2.0},
            },
            "retention": {},
            "gap_closed": None,
        },
    },
    "task_average": None,
}


@pytest.fixture
def run(coldstill: Callable[..., Any], write_recipe: Callable[..., Path]) -> Path:
    """The recipe of a run that is trained and not evaluated."""
    recipe = write_recipe()
    coldstill("precompute", recipe)
    coldstill("train", recipe)
    return recipe


def table_of(card: str) -> dict[str, list[str]]:
    """Give the cells of each line of the card's tables by the first of them."""
    lines = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("|")]
    return {first: [cell.strip() for cell in cells] for first, *cells in lines}


def test_the_card_gets_the_numbers_of_each_evaluation_in_place_of_the_last(
    coldstill: Callable[..., Any], run: Path, workplace: Path
):
    student = workplace / "run/student"
    before = (student / "README.md").read_text()
    assert not has_numbers(student)
    assert "model-index" not in before
    coldstill("evaluate", run)
    once = (student / "README.md").read_text()
    assert has_numbers(student)
    assert once.startswith(before), "nothing else of the card has changed"
    record = json.loads((workplace / "run/evaluation" / RESULTS_FILE).read_text())
    models = [record["models"][name] for name in ("teacher", "pruned", "recovered")]
    table = table_of(once)
    assert table["perplexity"][:3] == [f"{model['perplexity']:,.2f}" for model in models]
    assert table["KL to the teacher (nats)"][:3] == [f"{model['kl']:.4f}" for model in models]
    assert table["top-1 agreement with the teacher"][:3] == [f"{model['agreement']:.1%}" for model in models]
    shares = [record["gap_closed"][measure] for measure in ("perplexity", "kl", "agreement")]
    shown = [cells[-1] for name, cells in table.items() if name.startswith(("perplexity", "KL", "top-1"))]
    assert shown == ["no gap" if share is None else f"{share:.1%}" for share in shares]
    assert ("No gap: pruning left the student no worse" in once) == (None in shares)
    coldstill("evaluate", run)
    assert (student / "README.md").read_text() == once
    (student / "README.md").unlink()
    coldstill("evaluate", run, "evaluate.batch_size=2", "train.logging_steps=1")
    assert (student / "README.md").read_text() == once, "the card tells of the recipe that trained the student"


def test_the_card_says_what_was_cut_and_the_tasks_with_their_errors_for_people_and_for_the_hub(
    coldstill: Callable[..., Any], run: Path, workplace: Path
):
    recipe = load_recipe(run)
    pruned = find_student(recipe)
    (pruned / PRUNING_FILE).write_text(json.dumps(CUT))
    (pruned / CHECKSUMS).unlink()
    write_checksums(pruned)
    coldstill("evaluate", run)
    record = json.loads((workplace / "run/evaluation" / RESULTS_FILE).read_text())
    average = {"task_average": TASKS["tasks"]["arc_easy"]}
    update_card(recipe, find_run_rows(recipe), pruned, {**record, **TASKS, **average})
    card = ModelCard.load(workplace / "run/student/README.md")
    table = table_of(card.content)
    assert table["student"] == ["blocks 4 to 3, parameters 56,000 to 44,800 (80.0%), reconstructed"]
    assert table["arc_easy, acc_norm"] == ["60.0% ± 3.0%", "40.0% ± 3.1%", "55.0%", "91.7% ± 4.0%", "75.0% ± 20.0%"]
    assert table["lambada, perplexity"] == ["20.00 ± 1.00", "1,200.00 ± 50.00", "30.50 ± 2.00", "-", "no gap"]
    assert "average of 1 tasks" not in card.content
    assert "100 to 200 questions each" in card.content
    scores = {result.dataset_name: result for result in card.data.eval_results}
    assert (scores["arc_easy"].metric_type, scores["arc_easy"].metric_value) == ("acc_norm", 0.55)
    assert scores["lambada"].metric_args == {"num_samples": 100, "stderr": 2.0}
    assert card.data.model_name == "Student of teacher"
    two = dict.fromkeys(("arc_easy", "piqa"), TASKS["tasks"]["arc_easy"])
    update_card(recipe, find_run_rows(recipe), pruned, {**record, "tasks": two, **average})
    again = ModelCard.load(workplace / "run/student/README.md")
    assert table_of(again.content)["average of 2 tasks"] == table["arc_easy, acc_norm"]
    assert {result.dataset_name for result in again.data.eval_results} == {"arc_easy", "piqa"}
    assert again.content.count("## Recovery") == 1


def test_a_report_pushes_the_student_and_says_where_numbers_lack(
    coldstill: Callable[..., Any], run: Path, workplace: Path, hub: Hub
):
    early = coldstill("report", run, "--push", "someone/student", "--private")
    assert "the card has no numbers yet; run: coldstill evaluate" in early.stderr
    coldstill("evaluate", run)
    late = coldstill("report", workplace / "run", "--push", "someone/student", "--private", "--json")
    assert "no numbers" not in late.stderr
    assert json.loads(late.stdout)["pushed"].endswith("/someone/student")
    files = {file.name: file.read_bytes() for file in (workplace / "run/student").iterdir()}
    assert hub.repositories["someone/student"] == files
    assert b"## Recovery" in hub.repositories["someone/student"]["README.md"]
    (line,) = coldstill("report", run, "--private", expect=2).stderr.splitlines()
    assert "--private belongs to --push OWNER/NAME" in line
