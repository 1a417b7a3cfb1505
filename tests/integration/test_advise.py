"""`coldstill advise` through a recovery: before, between and after the stages, by what lies on the disk."""

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import text_data

from coldstill.pipeline.evaluate import evaluate
from coldstill.pipeline.judging.results import RESULTS_FILE
from coldstill.pipeline.outputs.provenance import PROVENANCE_FILE
from coldstill.pipeline.precompute import precompute
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.train import train


@pytest.fixture
def advised(coldstill: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    return lambda *arguments: json.loads(coldstill("advise", *arguments, "--json").stdout)


@dataclass(frozen=True)
class Run:
    """A recipe whose student is trained and evaluated, and the output that holds it."""

    recipe: Path
    output: Path

    @property
    def words(self) -> tuple[str, ...]:
        return str(self.recipe), f"output={self.output}"

    def rewrite(self, change: Callable[[dict[str, Any]], Any], record: str = f"evaluation/{RESULTS_FILE}") -> None:
        """Let a record say something else."""
        content = json.loads((self.output / record).read_text())
        change(content)
        (self.output / record).write_text(json.dumps(content))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folders: dict[str, Path], corpus: list[str]) -> Path:
    """The recipe of a run that all tests copy."""
    root = tmp_path_factory.mktemp("finished")
    data = {
        "output": str(root / "run"),
        "cache": str(root / "caches"),
        "teacher": {"path": str(model_folders["teacher"]), "dtype": "float32"},
        "data": text_data(root, corpus),
        "student": {"prune": {"layers": {"remove": 1, "method": "last"}, "reconstruct": False}},
        "preset": "book",
        "train": {"max_steps": 5, "per_device_train_batch_size": 4},
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    recipe = load_recipe(path)
    precompute(recipe, show_progress=False)
    train(recipe)
    evaluate(recipe, show_progress=False)
    return path


@pytest.fixture
def recovered(finished: Path, tmp_path: Path) -> Run:
    shutil.copytree(finished.parent / "run", tmp_path / "run")
    return Run(finished, tmp_path / "run")


def with_tasks(pruned: float, recovered: float, stderr: float) -> dict[str, Any]:
    estimates = {
        name: {"value": value, "stderr": stderr} for name, value in (("pruned", pruned), ("recovered", recovered))
    }
    one = {"metric": "acc", "higher_is_better": True, "num_samples": 200, "models": {}, "retention": estimates}
    return {"tasks": {"a": one}, "task_average": {"models": {}, "retention": estimates, "gap_closed": None}}


def rise(found: dict[str, Any], *, to: float, by: float) -> None:
    """Let the perplexity have risen; its error is 0.1."""
    found["models"]["recovered"]["perplexity"] = to
    found["gains"]["perplexity"] = {"value": -by, "stderr": 0.1}


def test_a_recovery_is_led_from_the_preset_to_its_evaluation_by_commands_that_run(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path], advised: Callable[..., dict[str, Any]]
):
    recipe = write_recipe(loss={}, train={"max_steps": 2, "per_device_train_batch_size": 4})
    start = advised(recipe)
    assert (start["step"], start["cut"], start["changes"]) == ("start", "depth", {"preset": "depth"})
    assert [shlex.split(line)[1] for line in start["commands"]] == ["plan", "precompute", "train", "evaluate"]
    precompute, train = start["commands"][1:3]
    coldstill(*shlex.split(precompute)[1:])
    coldstill(*shlex.split(train)[1:])
    between = advised(recipe, "preset=depth")
    assert (between["step"], between["retention"]) == ("evaluate", None)
    assert between["commands"] == [f"coldstill evaluate {recipe} preset=depth"]
    coldstill(*shlex.split(between["commands"][0])[1:])
    after = advised(recipe, "preset=depth")
    assert after["retention"]["measure"] == "agreement"
    assert "stands in" in after["notes"][0]
    for line in after["commands"]:
        coldstill(*shlex.split(line)[1:])


@pytest.mark.parametrize(
    ("student", "name"),
    [
        ({"prune": {"layers": {"remove": 1}}}, "depth"),
        ({"prune": {"mlp": {"keep": 0.5}}}, "width"),
        ({"prune": {"layers": {"remove": 1}, "hidden": {"size": 16}}}, "both"),
        ({"path": "narrow"}, "both"),
    ],
    ids=["depth", "width", "both", "a-path"],
)
def test_the_preset_goes_by_what_is_cut(
    write_recipe: Callable[..., Path],
    workplace: Path,
    advised: Callable[..., dict[str, Any]],
    student: dict[str, Any],
    name: str,
):
    if "path" in student:
        student = {"path": str(workplace / student["path"])}
    given = advised(write_recipe(student=student, loss={"gamma": 0.3}))
    assert given["changes"] == {"preset": name}
    assert any("loss.gamma=0.3 (preset: 0)" in note for note in given["notes"])


def test_a_student_whose_record_says_what_was_cut_needs_no_teacher(
    write_recipe: Callable[..., Path], workplace: Path, advised: Callable[..., dict[str, Any]]
):
    record = {
        "parameters": {"teacher": 1000, "student": 590},
        "blocks": {"teacher": 4, "student": 4, "kept": None},
        "mlp": {"teacher": 48, "student": 24},
        "hidden": {"teacher": 32, "student": 16},
    }
    (workplace / "narrow/pruning.json").write_text(json.dumps(record))
    given = advised(write_recipe(student={"path": str(workplace / "narrow")}, teacher__path=str(workplace / "gone")))
    assert given["changes"] == {"preset": "width"}
    assert given["read"]["student"] == "MLP width 48 to 24, hidden width 32 to 16, parameters 1,000 to 590 (59.0%)"


def test_results_lead_to_a_change_a_new_output_and_the_words_of_the_command_line(
    recovered: Run, advised: Callable[..., dict[str, Any]], coldstill: Callable[..., Any]
):
    recovered.rewrite(lambda found: found.update(with_tasks(0.7, 0.8, 0.01)))
    given = advised(*recovered.words, "evaluate.batch_size=4")
    assert given["retention"] == {"value": 0.8, "stderr": 0.01, "measure": "tasks"}
    words = f"{recovered.recipe} evaluate.batch_size=4 loss.gamma=0.15 output={recovered.output}-gamma0.15"
    assert given["commands"] == [f"coldstill train {words}", f"coldstill evaluate {words}"]
    enough = advised(*recovered.words, "--target", "0.75")
    assert (enough["step"], enough["commands"]) == ("done", [])
    shown = coldstill("advise", *recovered.words).stdout.splitlines()
    assert any(line.startswith("retention  80.0% ± 1.0%, of the teacher on tasks; wanted 95.0%") for line in shown)


def test_an_earlier_value_in_the_name_of_the_output_gives_way(recovered: Run, advised: Callable[..., dict[str, Any]]):
    recovered.rewrite(lambda found: found.update(with_tasks(0.7, 0.8, 0.01)))
    earlier = recovered.output.rename(f"{recovered.output}-gamma0.1-epochs5")
    given = advised(recovered.recipe, f"output={earlier}")
    assert given["commands"][0].endswith(f"loss.gamma=0.15 output={recovered.output}-epochs5-gamma0.15")


def test_an_unclear_retention_asks_for_more_questions_only_where_there_are_more(
    recovered: Run, advised: Callable[..., dict[str, Any]]
):
    recovered.rewrite(lambda found: found.update(with_tasks(0.7, 0.91, 0.01)))
    given = advised(*recovered.words, "evaluate.tasks=[a]", "evaluate.limit=200")
    assert (given["step"], given["changes"]) == ("samples", {"evaluate.limit": 800})
    assert given["commands"] == [
        f"coldstill evaluate {' '.join(recovered.words)} 'evaluate.tasks=[a]' evaluate.limit=800"
    ]
    assert advised(*recovered.words, "evaluate.tasks=[a]")["step"] == "epochs"


@pytest.mark.parametrize(
    ("change", "worse"),
    [
        (lambda found: found.update(with_tasks(0.95, 0.90, 0.03)), "retention fell from 95.0% to 90.0%"),
        (lambda found: rise(found, to=1e6, by=1e5), "perplexity rose"),
        (lambda found: found.update(with_tasks(0.95, 0.91, 0.03)), None),
        (lambda found: rise(found, to=1e6, by=0.15), None),
        (lambda found: rise(found, to=1.5, by=1e5), None),
    ],
    ids=["tasks", "perplexity", "within-the-error", "perplexity-within-the-error", "perplexity-up-to-the-teacher's"],
)
def test_a_task_forgotten_while_the_student_came_nearer_to_its_teacher_wants_alpha(
    recovered: Run, advised: Callable[..., dict[str, Any]], change: Any, worse: str | None
):
    def nearer(found: dict[str, Any]) -> None:
        pruned, trained = (found["models"][name] for name in ("pruned", "recovered"))
        pruned.update(kl=1.0, agreement=0.5)
        trained.update(kl=0.5, agreement=0.6, perplexity=pruned["perplexity"])
        found["gains"]["perplexity"] = {"value": 0.0, "stderr": 0.1}
        change(found)

    recovered.rewrite(nearer)
    given = advised(*recovered.words, "evaluate.limit=200")
    assert (given["step"] == "alpha") == (worse is not None)
    if worse:
        assert worse in given["reason"]
    recovered.rewrite(lambda found: found["models"]["recovered"].update(kl=1.0, agreement=0.5))
    assert advised(*recovered.words, "evaluate.limit=200")["step"] != "alpha"


def test_an_evaluation_older_than_the_student_is_not_gone_by(recovered: Run, advised: Callable[..., dict[str, Any]]):
    old = "2020-01-01T00:00:00+00:00"
    recovered.rewrite(lambda facts: facts.update(written_at=old), f"evaluation/{PROVENANCE_FILE}")
    assert advised(*recovered.words)["step"] == "evaluate"


def test_results_of_another_recipe_are_refused_in_one_line(coldstill: Callable[..., Any], recovered: Run):
    (line,) = coldstill("advise", *recovered.words, "loss.gamma=0.2", expect=2).stderr.splitlines()
    assert "holds a run of another recipe (loss differ; see " in line


def test_an_eval_loss_that_rises_at_the_end_asks_for_rows(recovered: Run, advised: Callable[..., dict[str, Any]]):
    for losses, is_noted in (((3.0, 2.5, 2.6), True), ((3.0, 2.6, 2.5), False)):
        log = [{"step": 10 * step, "eval_loss": loss} for step, loss in enumerate(losses)]
        recovered.rewrite(lambda metrics, log=log: metrics.update(log=log), "train.json")
        notes = advised(*recovered.words)["notes"]
        assert any("eval_loss was least at step 10" in note for note in notes) == is_noted
    recovered.rewrite(
        lambda metrics: metrics.update(log=[{"step": 1, "eval_loss": 2.0}, {"step": 2, "eval_loss": 3.0}]), "train.json"
    )
    recovered.rewrite(lambda found: found.update(with_tasks(0.7, 0.92, 0.001)))
    given = advised(*recovered.words)
    assert (given["step"], given["changes"]) == ("rows", {"data.train.max_rows": 40})
    assert "more rows rather than epochs" in given["reason"]
    assert [shlex.split(line)[1] for line in given["commands"]] == ["precompute", "train", "evaluate"]
    assert given["commands"][0].endswith(f"data.train.max_rows=40 output={recovered.output}-rows40")


def test_a_run_that_ended_within_its_first_epoch_is_to_see_its_rows_before_anything_else_is_changed(
    recovered: Run, advised: Callable[..., dict[str, Any]]
):
    log = [{"step": 5, "epoch": 0.16, "loss": 3.0}]
    recovered.rewrite(lambda metrics: metrics.update(log=log), "train.json")
    given = advised(*recovered.words)
    assert (given["step"], given["changes"]) == ("epochs", {"train.max_steps": 32})
    assert given["reason"].startswith("only 0.16 of an epoch was trained")
    recovered.rewrite(lambda found: found.update(with_tasks(0.7, 0.99, 0.001)))
    assert advised(*recovered.words)["step"] == "done"


def test_a_run_that_was_interrupted_is_to_be_ended_and_not_begun_with_a_preset(
    recovered: Run, advised: Callable[..., dict[str, Any]]
):
    (recovered.output / "train.json").unlink()
    shutil.rmtree(recovered.output / "student")
    given = advised(*recovered.words)
    assert (given["step"], given["changes"]) == ("train", {})
    assert given["reason"] == "training is at step 5 of 5"
    assert [shlex.split(line)[1] for line in given["commands"]] == ["train", "evaluate"]


def test_more_gamma_is_advised_with_the_blocks_that_it_needs(
    recovered: Run, advised: Callable[..., dict[str, Any]], coldstill: Callable[..., Any], tmp_path: Path
):
    words = (str(recovered.recipe), f"output={tmp_path}/bare", "loss.gamma=0", "targets.hidden.blocks=none")
    coldstill("precompute", *words)
    coldstill("train", *words)
    coldstill("evaluate", *words)
    given = advised(*words)
    assert given["changes"] == {"loss.gamma": 0.05, "targets.hidden.blocks": "mapped"}
    assert given["commands"][0].startswith("coldstill precompute ")
    load_recipe(recovered.recipe, shlex.split(given["commands"][1])[3:])


@pytest.mark.parametrize("target", ["0", "1.5", "95"])
def test_a_target_that_is_no_share_is_refused(coldstill: Callable[..., Any], write_recipe: Any, target: str):
    assert "--target" in coldstill("advise", write_recipe(), "--target", target, expect=2).stderr


def test_a_run_of_a_preset_is_that_of_the_values_it_stands_for(
    coldstill: Callable[..., Any], recovered: Run, tmp_path: Path
):
    written = yaml.safe_load(recovered.recipe.read_text()) | {"preset": None}
    written["loss"] = {"alpha": 0.5, "beta": 0.5, "gamma": 0.1, "temperature": 2, "hidden": "mse"}
    written["train"] |= {"learning_rate": 1e-5, "num_train_epochs": 3}
    (tmp_path / "written.yaml").write_text(yaml.safe_dump(written))
    same = coldstill("train", tmp_path / "written.yaml", f"output={recovered.output}")
    assert "complete already" in same.output
