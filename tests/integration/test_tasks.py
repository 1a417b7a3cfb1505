"""Tasks of lm-evaluation-harness on a run's models: local questions, no network, each model asked once."""

import io
import json
import shutil
import statistics
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from coldstill.cache.index import INDEX
from coldstill.pipeline.commands.evaluation_tables import task_table
from coldstill.pipeline.evaluate import Evaluation, evaluate
from coldstill.pipeline.judging import task_scores, tasks
from coldstill.pipeline.judging.task_scores import TaskAverage, TaskComparison
from coldstill.pipeline.judging.tasks import load_tasks
from coldstill.pipeline.outputs.retention import Estimate
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.recipe.sections import EvaluateConfig
from coldstill.pipeline.verify import verify

QUESTIONS = [
    {"ask": f"{a} and {b} make", "options": ["one", "a long answer", f"{a + b}", "many more"], "right": (a * b) % 4}
    for a in range(4)
    for b in range(6)
]
METRICS = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]


@pytest.fixture
def write_task(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a task of 24 questions, with changes to its configuration or its questions, and give its file."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", workplace / "datasets")
    folder = workplace / "tasks"
    folder.mkdir()

    def write(name: str = "sums", *, questions: list[dict[str, Any]] = QUESTIONS, **changes: Any) -> Path:
        data = folder / f"{name}.json"
        data.write_text("\n".join(map(json.dumps, questions)))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{ask}}",
            "doc_to_choice": "options",
            "doc_to_target": "right",
            "metric_list": METRICS,
        }
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**task, **changes}))
        return file

    return write


def kept_scores(workplace: Path) -> list[str]:
    return sorted(file.name for file in (workplace / "caches" / INDEX).glob("tasks-*"))


def table_lines(result: Evaluation) -> list[str]:
    screen = Console(width=80, file=io.StringIO())
    screen.print(task_table(result))
    return screen.file.getvalue().splitlines()


def forbid_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded for tasks")

    monkeypatch.setattr(task_scores, "load_model", load)


def test_every_model_answers_each_task_as_in_the_harness_itself(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path], write_task: Callable[..., Path], workplace: Path
):
    task = str(write_task())
    recipe = write_recipe(evaluate={"tasks": [task]})
    for command in ("precompute", "train"):
        coldstill(command, recipe)
    got = json.loads(coldstill("evaluate", recipe, "--json").stdout)
    sums = got["tasks"]["sums"]
    assert (sums["metric"], sums["higher_is_better"], sums["num_samples"]) == ("acc_norm", True, 24)
    assert list(sums["models"]) == ["teacher", "pruned", "recovered"]
    assert list(sums["retention"]) == ["pruned", "recovered"]
    from lm_eval import evaluate as ask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_defaults=False).load([task])
    loaded["tasks"]["sums"].set_config("num_fewshot", 0)
    loaded["tasks"]["sums"].set_fewshot_seed(1)
    for name, folder in (("teacher", workplace / "teacher"), ("recovered", workplace / "run/student")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=3)
        own = ask(lm=lm, task_dict=loaded)
        expected = {
            "value": own["results"]["sums"]["acc_norm,none"],
            "stderr": own["results"]["sums"]["acc_norm_stderr,none"],
        }
        assert sums["models"][name] == pytest.approx(expected)
        values = [sample["acc_norm"] for sample in own["samples"]["sums"]]
        assert sums["models"][name]["stderr"] == pytest.approx(statistics.stdev(values) / 24**0.5)
    teacher, recovered = (sums["models"][name]["value"] for name in ("teacher", "recovered"))
    assert sums["retention"]["recovered"]["value"] == pytest.approx(recovered / teacher)
    assert got["task_average"]["retention"] == sums["retention"]
    assert got == json.loads((workplace / "run/evaluation/results.json").read_text())


def test_what_was_asked_once_is_found_without_the_teachers_files_and_loads_no_model(
    coldstill: Callable[..., Any],
    write_recipe: Callable[..., Path],
    write_task: Callable[..., Path],
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    recipe = write_recipe(evaluate={"tasks": [str(write_task())], "limit": 6})
    coldstill("precompute", recipe)
    first = json.loads(coldstill("evaluate", recipe, "--json").stdout)
    assert first["tasks"]["sums"]["num_samples"] == 6
    assert len(kept_scores(workplace)) == 2
    assert verify(str(workplace / "caches"), show_progress=False).is_clean
    shutil.rmtree(workplace / "teacher")
    with monkeypatch.context() as patch:
        forbid_models(patch)
        # Another run, and the same questions in another place.
        shutil.move(workplace / "tasks", workplace / "moved")
        moved = yaml.safe_load((workplace / "moved/sums.yaml").read_text())
        moved["dataset_kwargs"]["data_files"]["test"] = str(workplace / "moved/sums.json")
        (workplace / "moved/sums.yaml").write_text(yaml.safe_dump(moved))
        changes = [f"evaluate.tasks=[{workplace}/moved/sums.yaml]", f"output={workplace}/other"]
        assert json.loads(coldstill("evaluate", recipe, *changes, "--json").stdout) == first
    error = coldstill("evaluate", recipe, changes[0], "evaluate.limit=7", expect=2).stderr.strip().splitlines()[-1]
    assert error.startswith("coldstill: not all of evaluate.tasks were asked of this teacher yet, now it is gone: no")


def test_a_damaged_score_is_computed_again(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path], write_task: Callable[..., Path], workplace: Path
):
    recipe = write_recipe(evaluate={"tasks": [str(write_task())], "limit": 4})
    coldstill("precompute", recipe)
    first = coldstill("evaluate", recipe, "--json").stdout
    name = kept_scores(workplace)[0]
    entry = workplace / "caches" / INDEX / name
    whole = entry.read_bytes()
    entry.write_bytes(whole.replace(b'"value"', b'"valve"'))
    assert [problem.file for problem in verify(str(workplace / "caches"), show_progress=False).problems] == [
        f"{INDEX}/{name}"
    ]
    assert coldstill("evaluate", recipe, "--json").stdout == first
    assert entry.read_bytes() == whole


def test_another_teacher_in_the_old_ones_place_is_not_asked(
    coldstill: Callable[..., Any],
    write_recipe: Callable[..., Path],
    write_task: Callable[..., Path],
    workplace: Path,
    build_model: Callable[..., Any],
):
    recipe = write_recipe(evaluate={"tasks": [str(write_task())]})
    coldstill("precompute", recipe)
    build_model(seed=5).save_pretrained(workplace / "teacher")
    assert "was made with another teacher" in coldstill("evaluate", recipe, expect=2).stderr


def test_a_teacher_that_would_stream_in_for_every_question_is_not_asked(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path], write_task: Callable[..., Path]
):
    recipe = write_recipe(evaluate={"tasks": [str(write_task())]}, teacher__placement="streamed")
    coldstill("precompute", recipe)
    line = coldstill("evaluate", recipe, expect=2).stderr.strip().splitlines()[-1]
    assert line.startswith("coldstill: evaluate.tasks are asked of the teacher too, and teacher.placement streamed")
    assert json.loads(coldstill("evaluate", recipe, "evaluate.tasks=[]", "--json").stdout)["tasks"] == {}


@pytest.fixture
def contents(write_task: Callable[..., Path]) -> Callable[..., str]:
    """Digest a task's content as it is written with changes."""

    def digest(section: dict[str, Any] | None = None, **changes: Any) -> str:
        (task,) = load_tasks(EvaluateConfig(tasks=[str(write_task(**changes))], **(section or {})))
        return task.content

    return digest


def test_a_tasks_content_is_its_questions_its_wording_and_how_it_is_judged(
    contents: Callable[..., str], workplace: Path
):
    digests = {
        "plain": contents(),
        "question": contents(questions=[*QUESTIONS[:-1], {**QUESTIONS[-1], "ask": "none and none make"}]),
        "limit": contents({"limit": 5}),
        "examples": contents({"num_fewshot": 2}),
        "wording": contents(doc_to_text="{{ask}} just"),
        "metric": contents(metric_list=METRICS[:1]),
        "version": contents(metadata={"version": 2}),
    }
    assert len(set(digests.values())) == len(digests)
    assert contents({"limit": 500}) == digests["plain"]
    assert contents({"num_fewshot": 0}) == digests["plain"]


def test_the_whole_file_of_a_tasks_function_is_part_of_its_content(contents: Callable[..., str], workplace: Path):
    file, code = workplace / "tasks" / "sums.yaml", workplace / "tasks" / "words.py"
    digests = []
    for verb in ("make", "give"):
        code.write_text(f"VERB = {verb!r}\n\ndef score(doc, results):\n    return {{'acc': float(VERB == 'make')}}\n")
        contents()
        task = yaml.safe_load(file.read_text())
        file.write_text(
            yaml.safe_dump({**task, "metric_list": METRICS[:1]}) + "process_results: !function words.score\n"
        )
        (loaded,) = load_tasks(EvaluateConfig(tasks=[str(file)]))
        digests.append(loaded.content)
    assert digests[0] != digests[1]


def test_examples_that_a_task_does_not_take_are_said_to_have_no_effect(contents: Callable[..., str]):
    with pytest.warns(UserWarning, match="evaluate.num_fewshot has no effect on sums"):
        contents({"num_fewshot": 2}, num_fewshot=0)


def test_lower_is_better_has_no_retention_and_counts_in_no_average(
    write_recipe: Callable[..., Path],
    write_task: Callable[..., Path],
    coldstill: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
):
    def metric(name: str, aggregation: str, *, higher_is_better: bool) -> dict[str, Any]:
        return {"metric_list": [{"metric": name, "aggregation": aggregation, "higher_is_better": higher_is_better}]}

    tasks = {
        "text": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{ask}}"}
        | metric("byte_perplexity", "weighted_perplexity", higher_is_better=False),
        "likely": {"output_type": "loglikelihood", "doc_to_target": "{{right}}"}
        | metric("perplexity", "perplexity", higher_is_better=False),
        "written": {"output_type": "generate_until", "doc_to_target": "{{ask}}"}
        | {"generation_kwargs": {"max_gen_toks": 2, "until": ["\n"], "do_sample": False}}
        | metric("exact_match", "mean", higher_is_better=True),
    }
    files = [write_task(name, doc_to_choice=None, **changes) for name, changes in tasks.items()]
    recipe = write_recipe(evaluate={"tasks": [file.name for file in files], "include_path": str(files[0].parent)})
    coldstill("precompute", recipe)
    capsys.readouterr()
    result = evaluate(load_recipe(recipe, ["evaluate.limit=2"]))
    assert capsys.readouterr().out == ""
    for name in ("text", "likely"):
        task = result.tasks[name]
        assert (task.higher_is_better, task.retention, task.gap_closed) == (False, {}, None)
        assert task.models["teacher"].value > 1
    assert result.tasks["text"].models["teacher"].stderr is None
    assert (result.tasks["likely"].models["teacher"].stderr or 0) > 0
    assert result.task_average is not None
    assert result.task_average.models["teacher"].value == result.tasks["written"].models["teacher"].value == 0
    assert result.task_average.retention == {}
    shown = "\n".join(" ".join(line.split()) for line in table_lines(result))
    assert "│ byte_perplexity │ ± ? │ ± ? │ │ │" in shown
    assert "│ of 1 task │" in shown


def test_the_table_of_tasks_is_readable_at_80_columns():
    models = {name: Estimate(0.4321, 0.0345) for name in ("teacher", "pruned", "recovered")}
    shares = {name: Estimate(1.234, 0.1234) for name in ("pruned", "recovered")}
    comparison = TaskComparison("acc_norm", True, 200, models, shares, Estimate(-12.345, 23.456))
    names = ("arc_challenge", "lambada_openai", "a_task_with_a_very_long_name_of_its_own")
    average = TaskAverage(models, shares, None)
    tasks = dict.fromkeys(names, comparison)
    lines = table_lines(Evaluation(dict.fromkeys(models), {}, {}, {}, 1, 1, tasks, average, {}))
    assert lines[0].rstrip() == "Tasks, 200 questions (± standard error)"
    assert max(map(len, lines)) <= 80
    assert [cell.strip() for cell in lines[4].split("│")[1:-1]] == [
        "arc_challenge", "43.2%", "43.2%", "43.2%", "123.4%", "-1234.5%"
    ]  # fmt: skip
    assert [cell.strip() for cell in lines[5].split("│")[1:-1]] == [
        "acc_norm", "± 3.5%", "± 3.5%", "± 3.5%", "± 12.3%", "± 2345.6%"
    ]  # fmt: skip
    assert lines[-3].split("│")[-2].strip() == "no gap"


@pytest.mark.parametrize(
    ("evaluate_section", "said"),
    [
        ({"tasks": ["summs.yaml"]}, "no task file summs.yaml, here or in FOLDER; did you mean 'sums.yaml'?"),
        ({"tasks": ["sums.yaml", "sums"]}, "names task 'sums' twice"),
        ({"tasks": ["sums", "sums"]}, "names a task twice: sums, sums"),
        ({"tasks": ["sums.yaml"], "include_path": "nowhere"}, "evaluate.include_path is nowhere, which is no folder"),
        ({"tasks": ["broken.yaml"]}, "broken.yaml cannot be loaded: "),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(map(str, value.values())),
)
def test_a_task_that_cannot_be_asked_is_one_line_before_anything_is_loaded(
    coldstill: Callable[..., Any],
    write_recipe: Callable[..., Path],
    write_task: Callable[..., Path],
    evaluate_section: dict[str, Any],
    said: str,
):
    folder = write_task().parent
    write_task("broken", test_split="other")
    section = {"include_path": str(folder), **evaluate_section}
    # Nothing was precomputed: the task is what is named first.
    error = coldstill("evaluate", write_recipe(evaluate=section), expect=2).stderr.strip().splitlines()[-1]
    assert error.startswith("coldstill: ")
    assert said.replace("FOLDER", str(folder)) in error


def test_a_name_that_the_harness_does_not_know_is_answered_with_the_nearest(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path], write_task: Callable[..., Path]
):
    known = ["arc_challenge", "hellaswag", "winogrande", "lambada_openai", "piqa", "sums"]
    section = {"tasks": [*known, "arc_eazy"], "include_path": str(write_task().parent)}
    error = coldstill("evaluate", write_recipe(evaluate=section), expect=2).stderr
    assert "has no task 'arc_eazy'; did you mean 'arc_easy'" in error
    assert len(error.strip().splitlines()) == 1


def test_keys_of_tasks_without_tasks_are_said_to_do_nothing(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path]
):
    error = coldstill("evaluate", write_recipe(evaluate={"limit": 3, "num_fewshot": 1}), expect=2).stderr
    for key in ("limit", "num_fewshot"):
        assert f"coldstill: evaluate.{key} has no effect: evaluate.tasks is empty" in error


def test_tasks_without_the_harness_name_the_extra(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(tasks, "version", version)
    error = coldstill("evaluate", write_recipe(evaluate={"tasks": ["arc_easy"]}), expect=2).stderr
    assert error == "coldstill: evaluate.tasks needs lm-eval; run: pip install 'coldstill[lm-eval]'\n"
