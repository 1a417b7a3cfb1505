"""The commands as a person and a script meet them: summaries, second runs, stage two alone, wrong input."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from crash.trees import files_below
from safetensors.torch import load_file, save_file
from typer.main import get_command

from coldstill.cli import app


def test_the_whole_way_then_a_second_run_that_finds_everything_complete(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path], workplace: Path
):
    recipe = write_recipe()
    first = coldstill("precompute", recipe).output
    assert "rows       20 train, 6 eval; 624 tokens in 2 shards" in first
    assert "computed   624 tokens" in first
    assert "trained    4 of 4 steps" in coldstill("train", recipe).output
    table = coldstill("evaluate", recipe).output
    for word in ("teacher", "pruned", "recovered", "gap closed", "KL to teacher", "Held-out text, 138 tokens"):
        assert word in table
    before = files_below(workplace / "caches")
    assert (
        "computed   nothing: all columns are complete, no teacher was loaded" in coldstill("precompute", recipe).output
    )
    assert "complete already, 4 steps" in coldstill("train", recipe).output
    assert files_below(workplace / "caches") == before
    for output in ("precompute", "student", "evaluation"):
        record = yaml.safe_load((workplace / "run" / output / "recipe.yaml").read_text())
        assert record["targets"]["logits"] == {
            "kind": "topk",
            "k": 16,
            "values": "delta",
            "samples": 32,
            "encoding": "coded",
            "step": 0.03,
            "temperatures": [1.0, 2.0],
        }
        facts = json.loads((workplace / "run" / output / "provenance.json").read_text())
        assert {"argv", "seed", "versions", "hardware", "written_at", "store"} <= facts.keys()


def test_json_summaries_are_json_and_nothing_else(coldstill: Callable[..., Any], write_recipe: Callable[..., Path]):
    recipe = write_recipe()
    assert json.loads(coldstill("prune", recipe, "--json").stdout)["report"]["blocks"]["kept"] == [0, 1, 2]
    assert json.loads(coldstill("precompute", recipe, "--json").stdout)["computed_tokens"] == 624
    assert json.loads(coldstill("train", recipe, "--json").stdout)["trained_steps"] == 4
    models = json.loads(coldstill("evaluate", recipe, "--json").stdout)["models"]
    assert models["teacher"]["kl"] == 0
    assert models["pruned"]["kl"] > 0


def test_a_new_block_and_more_rows_cost_only_what_is_new(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path]
):
    def run(**changes: Any) -> Any:
        return json.loads(coldstill("precompute", write_recipe(**changes), "--json").stdout)

    run(targets__hidden={"blocks": [0]}, loss__gamma=0.0)
    other_block = run(targets__hidden={"blocks": [0, 2]}, loss__gamma=0.0)
    assert other_block["computed_tokens"] == 624
    one_block_of_int8 = 624 * (32 + 4)
    assert other_block["written_bytes"] < 1.5 * one_block_of_int8
    assert run(targets__hidden={"blocks": [2]}, loss__gamma=0.0)["computed_tokens"] == 0
    more_rows = run(targets__hidden={"blocks": [0, 2]}, loss__gamma=0.0, data__train__max_rows=30)
    assert more_rows["computed_tokens"] == 10 * 24


PROBE = """
import json, sys
from coldstill.cli import app
from typer.testing import CliRunner
result = CliRunner().invoke(app, ["train", sys.argv[1]])
print(result.output, file=sys.stderr)
watched = (
    "coldstill.pipeline.models.teacher",
    "coldstill.pipeline.stage_one.capture",
    "coldstill.pipeline.rows.building",
    "coldstill.pipeline.students.making",
    "coldstill.pipeline.precompute",
)
print(json.dumps({"exit": result.exit_code, "imported": [name for name in watched if name in sys.modules]}))
"""


def in_new_process(script: str, *arguments: Any) -> Any:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_stage_two_runs_without_teacher_data_or_tokenizer_and_imports_no_teacher_loader(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path], workplace: Path
):
    recipe = write_recipe()
    coldstill("precompute", recipe)
    shutil.rmtree(workplace / "teacher")
    (workplace / "text.txt").unlink()
    got = in_new_process(PROBE, recipe)
    assert got == {"exit": 0, "imported": []}
    assert (workplace / "run/student/model.safetensors").is_file()
    assert "recovered" in coldstill("evaluate", recipe).output


def test_help_answers_without_torch():
    script = """
import json, sys
from typer.testing import CliRunner
from coldstill.cli import app
from typer.main import get_command
commands = [[], *([name] for name in get_command(app).commands), ["cache", "ls"], ["cache", "verify"]]
outputs = [CliRunner().invoke(app, [*command, "--help"]).output for command in commands]
print(json.dumps({"torch": "torch" in sys.modules, "said": all("Usage" in output for output in outputs)}))
"""
    assert in_new_process(script) == {"torch": False, "said": True}


WRONG = {
    "unknown key": (
        {"teacher__bacth_size": 3},
        "unknown key 'teacher.bacth_size' in {recipe}; did you mean 'batch_size'?",
    ),
    "wrong type": (
        {"loss__temperature": "hot"},
        "loss.temperature in {recipe}: Input should be a valid number, got 'hot'",
    ),
    "no teacher": ({"teacher__path": "/nowhere/model"}, "no model folder at /nowhere/model"),
    "no file": (
        {"data__train__data_files": "/nowhere.txt"},
        "cannot load data set 'text' (/nowhere.txt): Unable to find '/nowhere.txt'",
    ),
    "no rows": ({"data__train__max_rows": 0}, "data.train.max_rows in {recipe}: Input should be greater than 0, got 0"),
    "no column": (
        {"data__train__text_column": "body"},
        "data set 'text' ({recipe.parent}/text.txt) has no column 'body'; it has text",
    ),
    "no folder": ({"data__train": {"path": "./nope"}}, "no file or folder at {here}/nope, which the source's path"),
    "no text": (
        {"data__train__data_files": "{recipe.parent}/teacher/model.safetensors"},
        "cannot load data set 'text' ({recipe.parent}/teacher/model.safetensors): "
        "{recipe.parent}/teacher/model.safetensors, line 1, is not utf-8: byte 0x",
    ),
    "k too large": (
        {"targets__logits__k": 385},
        "targets.logits.k is 385, but the teacher's vocabulary has 384 entries",
    ),
    "no such block": (
        {"targets__hidden": {"blocks": [4]}},
        "targets.hidden.blocks names block 4; the teacher has blocks 0 to 3",
    ),
    "no such block to prune": (
        {"student": {"prune": {"layers": {"method": "explicit", "blocks": [9]}}}},
        "student.prune.layers.blocks names block 9; the teacher has blocks 0 to 3",
    ),
    "nothing left": (
        {"student": {"prune": {"layers": {"remove": 4}}}},
        "student.prune.layers removes 4 of the teacher's 4 blocks: none is left",
    ),
    "too long": ({"data__sequence_length": 65}, "data.sequence_length is 65, but the teacher reads at most 64 tokens"),
    "too few pairs": (
        {"mapping": {"strategy": "last", "num_pairs": 9}},
        "mapping.num_pairs is 9, but the student has 3",
    ),
    "no corpus": ({"data__train__path": "builtin:perl"}, "no built-in corpus 'builtin:perl'"),
    "no student": ({"student": {"path": "/nowhere/student"}}, "no model folder at /nowhere/student"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_exit_2_and_leaves_nothing(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path], workplace: Path, case: str
):
    changes, message = WRONG[case]
    recipe = write_recipe(**changes)
    recipe.write_text(recipe.read_text().replace("{recipe.parent}", str(workplace)))
    before = set(files_below(workplace))
    result = coldstill("precompute", recipe, expect=2)
    assert result.stderr.startswith("coldstill: " + message.format(recipe=recipe, here=Path.cwd())), result.stderr
    assert result.stderr.count("\n") == 1
    left = {name for name in set(files_below(workplace)) - before if not name.startswith("caches/students/")}
    assert left == set()


def test_an_empty_text_is_refused(coldstill: Callable[..., Any], write_recipe: Callable[..., Path], workplace: Path):
    (workplace / "text.txt").write_text("\n \n")
    result = coldstill("precompute", write_recipe(), expect=2)
    said = f"coldstill: data.eval gives no row: no row of 'text' ({workplace}/text.txt) holds text; is text_column the"
    assert result.stderr.startswith(said)


def test_documents_that_train_leaves_out_because_eval_has_them_are_counted(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path], workplace: Path, corpus: list[str]
):
    (workplace / "text.txt").write_text("\n".join(corpus[:12] * 3))
    recipe = write_recipe(data__train__max_rows=None)
    told = coldstill("precompute", recipe).output
    summary = json.loads(coldstill("precompute", recipe, "--json").stdout)
    assert summary["num_shared"] > 0
    assert summary["num_shared"] % 2 == 0, "each copy of what eval has, and there are two of each"
    assert f"left out   {summary['num_shared']} documents or rows of train, because eval has them" in told


def test_a_student_of_another_vocabulary_is_refused_before_any_work(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path], workplace: Path, build_model: Callable[..., Any]
):
    build_model(vocab_size=400).save_pretrained(workplace / "other")
    result = coldstill("precompute", write_recipe(student={"path": str(workplace / "other")}), expect=2)
    assert "teacher and student have different vocabularies: 384 entries against 400" in result.stderr
    assert not (workplace / "caches").exists()


def test_projectors_none_between_different_widths_is_refused(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path], workplace: Path
):
    changes = {"student": {"path": str(workplace / "narrow")}, "mapping": {"strategy": "uniform"}}
    coldstill("precompute", write_recipe(**changes))
    for stage in ("precompute", "train"):
        result = coldstill(stage, write_recipe(**changes, projector={"kind": "none"}), expect=2)
        assert "projector.kind is none, but the student's width 16 is not the teacher's 32; use auto" in result.stderr


def test_training_before_precomputing_and_rows_that_are_not_stored_are_refused(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path]
):
    result = coldstill("train", write_recipe(), expect=2)
    assert (
        "holds no rows for this recipe's teacher and data sections (nothing is there); run: coldstill" in result.stderr
    )
    coldstill("precompute", write_recipe())
    result = coldstill("train", write_recipe(data__train__max_rows=21), expect=2)
    assert "teacher and data sections (the nearest there: data.train.max_rows 20 there, 21 here); run:" in result.stderr


@pytest.mark.parametrize("command", ["prune", "precompute", "plan", "train", "evaluate", "advise"])
def test_changes_may_stand_before_the_recipe(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path], command: str
):
    result = coldstill(command, "loss.alhpa=1", write_recipe(), expect=2)
    assert "unknown key 'loss.alhpa' in override 'loss.alhpa=1'; did you mean 'alpha'?" in result.stderr


def test_changes_may_stand_before_a_sweep(coldstill: Callable[..., Any], write_recipe: Callable[..., Path]):
    recipe = write_recipe()
    sweep = recipe.with_name("sweep.yaml")
    sweep.write_text(
        yaml.safe_dump({"output": str(recipe.with_name("s")), "recipe": recipe.name, "variants": {"a": {}}})
    )
    assert "in override 'loss.alhpa=1'" in coldstill("ablate", "loss.alhpa=1", sweep, expect=2).stderr
    for command in ("train", "precompute", "report"):
        (line,) = coldstill(command, sweep, expect=2).stderr.splitlines()
        assert f"is a sweep, which coldstill ablate {sweep} carries out" in line
    assert f"is a recipe, which coldstill train {recipe} takes" in coldstill("ablate", recipe, expect=2).stderr


def test_two_recipes_are_one_too_many(coldstill: Callable[..., Any], write_recipe: Callable[..., Path]):
    recipe = write_recipe()
    assert (
        f"one recipe is taken, got {recipe} and other.yaml" in coldstill("train", recipe, "other.yaml", expect=2).stderr
    )
    assert "no recipe among loss.alpha=1" in coldstill("train", "loss.alpha=1", expect=2).stderr
    assert "override 'loss.alpha' must look like" in coldstill("train", recipe, "loss.alpha", expect=2).stderr


def test_every_command_speaks_json():
    def commands(group: Any, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
        for name, command in group.commands.items():
            is_group = hasattr(command, "commands")
            yield from commands(command, *names, name) if is_group else [((*names, name), command)]

    found = dict(commands(get_command(app)))
    assert ("cache", "rm") in found
    assert [name for name, command in found.items() if not any("--json" in part.opts for part in command.params)] == []


def test_what_was_removed_is_said_in_json(coldstill: Callable[..., Any], write_recipe: Callable[..., Path]):
    recipe = write_recipe()
    store = json.loads(coldstill("precompute", recipe, "--json").stdout)["store"]
    root = str(Path(store).parents[1])
    gone = json.loads(coldstill("cache", "rm", root, "--yes", "--column", "hidden/1/int8", "--json").stdout)
    assert gone == {"store": store, "column": "hidden/1/int8"}
    assert json.loads(coldstill("cache", "rm", root, "--yes", "--json").stdout) == {"store": store, "column": None}
    assert not Path(store).exists()


def test_columns_that_are_not_complete_are_counted(coldstill: Callable[..., Any], write_recipe: Callable[..., Path]):
    coldstill("precompute", write_recipe(targets__hidden={"blocks": [0]}, loss__gamma=0.0))
    result = coldstill("train", write_recipe(), expect=2)
    assert (
        "is incomplete: 0 of 1 shards of hidden/1/int8; 0 of 1 shards of hidden/2/int8; run: coldstill" in result.stderr
    )


def test_a_store_of_another_teacher_is_refused_with_what_differs(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path], workplace: Path
):
    recipe = write_recipe()
    coldstill("precompute", recipe)
    file = workplace / "teacher/model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    result = coldstill("train", recipe, expect=2)
    assert "was made with another teacher than" in result.stderr
    assert ": weights " in result.stderr
    coldstill("precompute", recipe)
    coldstill("train", recipe)


def test_a_teacher_that_overflows_is_named_by_row_block_and_position(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path], workplace: Path
):
    file = workplace / "teacher/model.safetensors"
    weights = load_file(file)
    weights["model.layers.2.mlp.down_proj.weight"][:] = 3e38
    save_file(weights, file, metadata={"format": "pt"})
    result = coldstill("precompute", write_recipe(), expect=2)
    expected = r"teacher gave a non-finite value: eval row 0, block 2, position \d+; dtype float32, beyond which"
    assert re.search(expected, result.stderr)


def test_a_full_disk_is_one_line_and_the_run_goes_on_afterwards(
    coldstill: Callable[..., Any], write_recipe: Callable[..., Path], workplace: Path, monkeypatch: pytest.MonkeyPatch
):
    from coldstill.cache.objects import LocalObjects

    recipe = write_recipe()
    write_all = LocalObjects.write_all
    calls = 0

    def full_after_a_while(self: LocalObjects, objects: dict[str, bytes]) -> None:
        nonlocal calls
        calls += 1
        if calls > 26:
            raise OSError(28, "No space left on device", next(iter(objects)))
        write_all(self, objects)

    with monkeypatch.context() as patch:
        patch.setattr(LocalObjects, "write_all", full_after_a_while)
        result = coldstill("precompute", recipe, expect=2)
    stays = "before the first of 2 shards was complete; the same command begins with it"
    assert f"No space left on device, {stays}" in result.stderr
    assert not list(workplace.rglob(".partial/*"))
    coldstill("precompute", recipe)
    resumed = files_below(workplace / "caches/stores")
    shutil.rmtree(workplace / "caches")
    coldstill("precompute", recipe)
    assert files_below(workplace / "caches/stores") == resumed
