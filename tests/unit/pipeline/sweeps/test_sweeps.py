"""Sweeps: their files, their keys, what they found, and the recipes and sweeps that are shipped."""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from forked import Forks
from rich.console import Console

from coldstill.cache.errors import InUseError
from coldstill.cache.processes import is_dead
from coldstill.pipeline.ablate import ablate
from coldstill.pipeline.commands.sweep_tables import sweep_lines, sweep_tables
from coldstill.pipeline.recipe.file import load_recipe, parse_recipe
from coldstill.pipeline.runtime.errors import RecipeError
from coldstill.pipeline.sweeps.file import Sweep, load_sweep
from coldstill.pipeline.sweeps.keys import canonical, sweep_key
from coldstill.pipeline.sweeps.processes import Outcome, run_command
from coldstill.pipeline.sweeps.results import before_training, is_sweep, output_of, read_sweep, spread_of
from coldstill.pipeline.sweeps.state import SweepState, hold_sweep

CONFIGS = Path(__file__).parents[4] / "configs"
BASE = {
    "output": "ignored",
    "teacher": {"path": "models/teacher"},
    "data": {"train": {"path": "text", "data_files": "a.txt"}, "eval": {"path": "text", "data_files": "b.txt"}},
    "student": {"prune": {"layers": {"remove": 2, "method": "last"}}},
    "loss": {"alpha": 0.5, "beta": 0.5, "gamma": 0.1, "temperature": 2.0},
    "train": {"learning_rate": 0.001},
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a sweep beside its base recipe, with changes, and give its path."""

    def write(**changes: Any) -> Path:
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
        path = tmp_path / "my-sweep.yaml"
        sweep = {"output": str(tmp_path / "out"), "recipe": "base.yaml", **changes}
        kept = {key: value for key, value in sweep.items() if value != "left out"}
        path.write_text(yaml.safe_dump(kept, sort_keys=False))
        return path

    return write


def key_of(**changes: Any) -> str:
    recipe = json.loads(json.dumps(BASE))
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        section = recipe
        for part in parents:
            section = section.setdefault(part, {})
        section[last] = value
    return sweep_key(parse_recipe(recipe, name="test"))


def test_every_variant_meets_every_grid_point_and_every_seed(write: Callable[..., Path]):
    sweep = load_sweep(
        write(
            seeds=[3, 1],
            variants={"all": None, "task": {"loss.beta": 0}},
            grid={"loss.temperature": [1, 2.5], "train.weight_decay": [0.1], "targets.hidden.blocks": [[1, 2]]},
        )
    )
    assert sweep.name == "my-sweep"
    rest = "train.weight_decay=0.1, targets.hidden.blocks=[1, 2]"
    assert [variant.name for variant in sweep.variants] == [
        f"all, loss.temperature=1, {rest}",
        f"all, loss.temperature=2.5, {rest}",
        f"task, loss.temperature=1, {rest}",
        f"task, loss.temperature=2.5, {rest}",
    ]
    last = sweep.variants[-1]
    assert list(last.recipes) == [3, 1]
    assert last.changes["loss.beta"] == 0
    recipe = last.recipes[3]
    assert (recipe.loss.beta, recipe.loss.temperature, recipe.seed) == (0, 2.5, 3)
    assert recipe.train["learning_rate"] == 0.001, "the rest is the base recipe's"


def test_overrides_of_the_sweep_and_of_the_command_line_change_the_base_and_variants_have_the_last_word(
    write: Callable[..., Path],
):
    overrides = dict.fromkeys(("loss.alpha", "loss.gamma", "loss.beta"), 0.3)
    path = write(overrides=overrides, variants={"v": {"loss.beta": 0.9}})
    recipe = load_sweep(path, ["loss.gamma=0.4", "loss.beta=0.4"]).variants[0].recipes[42]
    assert (recipe.loss.alpha, recipe.loss.gamma, recipe.loss.beta) == (0.3, 0.4, 0.9)
    listed = load_sweep(write(overrides=["loss.alpha=0.7"])).variants[0]
    assert listed.name == "base"
    assert listed.recipes[42].loss.alpha == 0.7


def test_the_seed_is_the_base_recipes_own_where_the_sweep_names_none(write: Callable[..., Path]):
    assert list(load_sweep(write(), ["train.seed=7"]).variants[0].recipes) == [7]
    assert list(load_sweep(write(seeds=[1, 2]), ["train.seed=7"]).variants[0].recipes) == [1, 2]


def test_a_recipe_may_stand_in_the_sweep_itself(write: Callable[..., Path]):
    inline = {key: value for key, value in BASE.items() if key != "output"}
    assert load_sweep(write(recipe=inline)).variants[0].recipes[42].teacher.path == "models/teacher"


WRONG = [
    ({"varaints": {}}, "unknown key 'varaints' in PATH; did you mean 'variants'?"),
    ({"output": "left out"}, "missing key 'output' in PATH"),
    ({"recipe": 3}, "recipe in PATH: takes a recipe's path, or the recipe itself as a map, got 3"),
    ({"recipe": "gone.yaml"}, "no recipe at FOLDER/gone.yaml"),
    ({"seeds": [1, 1]}, "seeds in PATH: takes at least one whole number from 0, and none twice, got [1, 1]"),
    ({"seeds": []}, "seeds in PATH: takes at least one whole number from 0, and none twice, got []"),
    ({"seeds": [1.5]}, "seeds.0 in PATH: Input should be a valid integer, got 1.5"),
    ({"variants": {"a": 3}}, "variants in PATH: variant 'a' takes a map of dotted keys to values"),
    ({"variants": {"a": {"loss..beta": 3}}}, "variants in PATH: variant 'a' takes a map of dotted keys to values"),
    (
        {"variants": {"a": {"loss.betta": 1}}},
        "unknown key 'loss.betta' in variant 'a' of PATH over base.yaml; did you mean 'beta'?",
    ),
    (
        {"variants": {"a": {}, "b": {"loss.beta": -1}}},
        "loss.beta in variant 'b' of PATH over base.yaml: Input should be greater than or equal to 0, got -1",
    ),
    (
        {"variants": {"a": {"targets.logits.kind": "none"}}},
        "variant 'a' of PATH over base.yaml: loss.beta is above 0 but targets.logits.kind is none",
    ),
    (
        {"variants": {"a": {"output.x": 1}}},
        "PATH: variant 'a' sets output.x, which is decided by the sweep's output",
    ),
    (
        {"variants": {"a": {"train.seed": 1}}},
        "PATH: variant 'a' sets train.seed, which is decided by the sweep's seeds",
    ),
    ({"grid": {"teacher.dtype": ["float32"]}}, "PATH: grid sets teacher.dtype, which is decided by the base recipe"),
    (
        {"variants": {"a": {"loss.beta": 1}}, "grid": {"loss.beta": [1]}},
        "PATH: variant 'a' and grid both set loss.beta",
    ),
    ({"grid": {"loss.beta": [1, 1]}}, "grid in PATH: loss.beta takes at least one value, and none twice"),
    ({"grid": {"loss.beta": []}}, "grid in PATH: loss.beta takes at least one value, and none twice"),
    (
        {"variants": {"a": {"teacher_x.y": 1}}},
        "unknown key 'teacher_x' in variant 'a' of PATH over base.yaml; did you mean 'teacher'?",
    ),
    (
        {"variants": {"a": {"train.learning_rate.x": 1}}},
        "variant 'a' of PATH over base.yaml, train.learning_rate.x: learning_rate is a value, not a section",
    ),
    ({"overrides": 3}, "overrides in PATH: takes a map of dotted keys to values, or a list of section.key=value"),
    ({"overrides": ["output=x"]}, "override 'output=x': where a sweep's runs go is decided by output in PATH"),
    ({"overrides": ["x"]}, "override 'x' must look like section.key=value"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=lambda case: str(case)[:50])
def test_a_wrong_sweep_is_one_line_that_names_where(write: Callable[..., Path], changes, message):
    path = write(**changes)
    with pytest.raises(RecipeError) as raised:
        load_sweep(path)
    expected = message.replace("PATH", str(path)).replace("FOLDER", str(path.parent))
    assert str(raised.value).startswith(expected), str(raised.value)
    assert "\n" not in str(raised.value)


SAME_RESULT = {
    "output": {"output": "elsewhere"},
    "cache": {"cache": "/other/caches", "local_copy": "/fast"},
    "how the teacher runs": {"teacher__batch_size": 64, "teacher__device": "cpu", "teacher__trust_remote_code": True},
    "how models are judged": {"evaluate__batch_size": 3},
    "workers": {"train__dataloader_num_workers": 4},
    "logging": {"train__logging_steps": 1, "train__report_to": "none", "train__disable_tqdm": True},
    "saving": {"train__save_steps": 3, "train__save_total_limit": 1},
    "paths written otherwise": {
        "teacher__path": "./models//teacher/",
        "data__train__data_files": str(Path.cwd() / "a.txt"),
    },
}
OTHER_RESULT = {
    "loss weight": {"loss__gamma": 0.2},
    "temperature": {"loss__temperature": 3},
    "seed": {"train__seed": 1},
    "learning rate": {"train__learning_rate": 0.002},
    "batches": {"train__dataloader_drop_last": True},
    "teacher": {"teacher__path": "models/other"},
    "dtype": {"teacher__dtype": "float16"},
    "rows": {"data__train__max_rows": 7},
    "eval rows": {"data__eval__max_rows": 7},
    "student": {"student__prune__layers__remove": 1},
    "mapping": {"mapping__strategy": "last"},
    "logits": {"targets__logits__kind": "topk"},
    "projector": {"projector__kind": "mlp"},
}


def test_when_a_run_is_judged_counts_where_that_chooses_its_checkpoint():
    assert key_of(train__eval_steps=2) == key_of(train__eval_steps=3)
    best = {"train__load_best_model_at_end": True}
    assert key_of(train__eval_steps=2, **best) != key_of(train__eval_steps=3, **best)


@pytest.mark.parametrize("changes", SAME_RESULT.values(), ids=SAME_RESULT)
def test_what_changes_no_result_changes_no_key(changes):
    assert key_of(**changes) == key_of()


@pytest.mark.parametrize("changes", OTHER_RESULT.values(), ids=OTHER_RESULT)
def test_what_changes_the_result_changes_the_key(changes):
    assert key_of(**changes) != key_of()


def test_without_hidden_terms_the_mapping_makes_no_other_run():
    plain = key_of(loss__gamma=0)
    idle = {"mapping__strategy": "last", "projector__kind": "mlp", "loss__hidden": "cosine"}
    assert key_of(loss__gamma=0, **idle, targets__hidden__encoding="float16") == plain
    assert key_of(loss__gamma=0, loss__delta=0.1, mapping__strategy="last") != key_of(loss__gamma=0, loss__delta=0.1)


def test_without_a_divergence_temperature_and_stored_logits_make_no_other_run():
    plain = key_of(loss__beta=0)
    idle = {"loss__temperature": 3, "targets__logits__kind": "topk", "loss__divergence": "reverse_kl"}
    assert key_of(loss__beta=0, **idle) == plain
    rising = {"loss__schedule": {"beta": {"end": 0.5}}}
    assert key_of(loss__beta=0, **rising, loss__temperature=3) != key_of(loss__beta=0, **rising)


def test_one_term_has_nothing_to_be_balanced_with():
    balance = {"loss__balance": "gradient"}
    assert key_of(loss__beta=0, loss__gamma=0, **balance) == key_of(loss__beta=0, loss__gamma=0)
    assert key_of(loss__gamma=0, **balance) != key_of(loss__gamma=0)
    assert key_of(loss__balance="none") == key_of()


def test_recipes_with_one_key_have_one_canonical_form_that_stores_nothing_in_vain():
    loss = {"alpha": 1, "beta": 0, "gamma": 0}
    data = {**BASE, "student": {"path": "./narrow/"}, "loss": loss, "mapping": {"strategy": "last"}}
    recipe = parse_recipe(data, name="test")
    other = parse_recipe({**data, "student": {"path": "narrow"}, "mapping": {"strategy": "stride"}}, name="test")
    assert canonical(recipe) == canonical(other)
    assert canonical(recipe).targets.hidden.blocks == "none"
    assert canonical(recipe).targets.logits.kind == "none"
    assert canonical(parse_recipe(BASE, name="test")) == parse_recipe(BASE, name="test")


def evaluation(
    recovered: dict[str, float], tasks: dict[str, float] | None = None, *, has_gap: bool = True
) -> dict[str, Any]:
    """Make an evaluation, as earlier versions wrote it, whose teacher has a KL of 0 and whose pruned student one of 1.

    The gap of its task is one, or none within its error.
    """
    teacher = {"loss": 3.0, "perplexity": 20.0, "kl": 0.0, "agreement": 1.0}
    pruned = {"loss": 5.0, "perplexity": 150.0, "kl": 1.0, "agreement": 0.4}
    record: dict[str, Any] = {
        "models": {"teacher": teacher, "pruned": pruned, "recovered": {**pruned, **recovered}},
        "gap_closed": {"kl": 1 - recovered["kl"]},
        "task_average": None,
        "tasks": {},
        "num_tokens": 100,
    }
    if tasks is not None:
        values = {"teacher": 0.8, "pruned": 0.4, "recovered": tasks["arc"]}
        models = {name: {"value": value, "stderr": 0.01} for name, value in values.items()}
        record["tasks"] = {"arc": {"metric": "acc", "models": models}}
        shares = {name: {"value": values[name] / 0.8, "stderr": 0.01} for name in ("pruned", "recovered")}
        closed = {"value": (tasks["arc"] - 0.4) / 0.4, "stderr": 0.02} if has_gap else None
        record["task_average"] = {"retention": shares, "gap_closed": closed}
    return record


def finish(output: Path, judged: dict[str, Any], *, seconds: float) -> None:
    summary = {"num_steps": 10, "trained_steps": 2, "seconds": seconds, "peak_memory_bytes": 5e8, "losses": {}}
    (output / "evaluation").mkdir(parents=True, exist_ok=True)
    (output / "train.json").write_text(json.dumps({"summary": summary, "log": []}))
    (output / "evaluation" / "provenance.json").write_text(json.dumps({"evaluation": judged}))


@pytest.fixture
def sweep(write: Callable[..., Path]) -> tuple[Sweep, SweepState]:
    """A sweep of two variants and three seeds, of which nothing was run."""
    loaded = load_sweep(write(seeds=[1, 2, 3], variants={"good": {}, "bad": {"loss.beta": 0}}))
    keys = {(variant.name, seed): f"{variant.name}{seed}" for variant in loaded.variants for seed in variant.recipes}
    loaded.output.mkdir()
    return loaded, SweepState(loaded, keys)


def test_mean_and_sample_deviation_are_numpys(sweep: tuple[Sweep, SweepState]):
    loaded, state = sweep
    kls = [0.31, 0.35, 0.29]
    for seed, kl in enumerate(kls, start=1):
        finish(output_of(loaded.output, f"good{seed}"), evaluation({"kl": kl, "perplexity": 90.0 / seed}), seconds=10)
        state.note(f"good{seed}", "complete")
    state.note("bad1", "failed", "it cannot be")
    result = read_sweep(loaded.output)
    good, bad = result.variants
    assert good.measures["kl"].mean == pytest.approx(np.mean(kls), rel=1e-12)
    assert good.measures["kl"].deviation == pytest.approx(np.std(kls, ddof=1), rel=1e-12)
    assert good.measures["perplexity"].deviation == pytest.approx(np.std([90, 45, 30], ddof=1), rel=1e-12)
    assert good.measures["kl"].num == 3
    assert [run.status for run in bad.runs] == ["failed", "pending", "pending"]
    assert bad.measures == {}
    assert (result.teacher or {})["perplexity"] == 20.0
    assert result.pruned["pruned"]["kl"] == 1.0
    assert spread_of([2.0]).deviation is None


def test_students_before_training_are_named_after_the_variants_that_train_them(sweep: tuple[Sweep, SweepState]):
    loaded, state = sweep
    for key, kl in (("good1", 0.5), ("good2", 0.5), ("bad1", 0.7)):
        judged = evaluation({"kl": 0.3})
        judged["models"]["pruned"] = {**judged["models"]["pruned"], "kl": kl}
        finish(output_of(loaded.output, key), judged, seconds=1)
        state.note(key, "complete")
    summary = {"computed_tokens": 1, "written_bytes": 1, "seconds": 1.0, "students": ["s/a", "s/a", "s/b"]}
    state.note_precompute(summary, ["good1", "good2", "bad1"])
    before = before_training(read_sweep(loaded.output))
    assert {name: figures["kl"] for name, figures in before.items()} == {
        "teacher": 0.0,
        "pruned (good)": 0.5,
        "pruned (bad)": 0.7,
    }


def test_the_cost_of_a_point_is_of_the_gap_in_kl_or_of_retention_where_there_are_tasks(
    sweep: tuple[Sweep, SweepState],
):
    loaded, state = sweep
    finish(output_of(loaded.output, "good1"), evaluation({"kl": 0.5}), seconds=100)
    finish(output_of(loaded.output, "bad1"), evaluation({"kl": 0.5}, {"arc": 0.6}), seconds=50)
    state.note("good1", "complete")
    state.note("bad1", "complete")
    good, bad = read_sweep(loaded.output).variants
    assert good.measures["seconds_per_point"].mean == pytest.approx(100 / 50)
    assert bad.measures["seconds"].mean == 50, "of all 10 steps, though the last call took 2"
    assert bad.measures["seconds_per_point"].mean == pytest.approx(50 / 25)
    assert bad.measures["retention"].mean == pytest.approx(0.75)
    assert bad.measures["task/arc"].mean == bad.measures["task_average"].mean == 0.6


def test_where_pruning_opened_no_gap_a_point_has_no_cost(sweep: tuple[Sweep, SweepState]):
    loaded, state = sweep
    without = evaluation({"kl": 0.5})
    without["models"]["pruned"]["kl"] = 0.0  # by its value: an earlier version wrote it, and gave a share all the same
    finish(output_of(loaded.output, "good1"), without, seconds=100)
    within_its_error = evaluation({"kl": 0.5}) | {
        "gaps": {"kl": {"value": 1.0, "stderr": 0.9}},
        "gap_closed": {"kl": None},
    }
    finish(output_of(loaded.output, "good2"), within_its_error, seconds=100)
    finish(output_of(loaded.output, "bad1"), evaluation({"kl": 0.5}, {"arc": 0.6}, has_gap=False), seconds=10)
    for key in ("good1", "good2", "bad1"):
        state.note(key, "complete")
    good, bad = read_sweep(loaded.output).variants
    assert [run.evaluation["gap_closed"]["kl"] for run in good.runs if run.evaluation] == [None, None]
    assert "seconds_per_point" not in good.measures
    assert "seconds_per_point" not in bad.measures
    assert bad.measures["retention"].mean == pytest.approx(0.75)


def test_a_variant_that_recovered_nothing_has_no_cost_of_a_point(sweep: tuple[Sweep, SweepState]):
    loaded, state = sweep
    finish(output_of(loaded.output, "good1"), evaluation({"kl": 0.5}), seconds=100)
    finish(output_of(loaded.output, "good2"), evaluation({"kl": 1.5}), seconds=100)
    state.note("good1", "complete")
    state.note("good2", "complete")
    assert "seconds_per_point" not in read_sweep(loaded.output).variants[0].measures


def test_models_that_were_judged_on_different_text_have_no_row_of_their_own(sweep: tuple[Sweep, SweepState]):
    loaded, state = sweep
    finish(output_of(loaded.output, "good1"), evaluation({"kl": 0.5}), seconds=100)
    other = evaluation({"kl": 0.5})
    other["models"]["teacher"]["loss"] = 2.0
    finish(output_of(loaded.output, "good2"), other, seconds=100)
    state.note("good1", "complete")
    state.note("good2", "complete")
    result = read_sweep(loaded.output)
    assert result.teacher is None
    assert any("judged on different text" in line for line in sweep_lines(result))


def test_the_tables_are_readable_at_80_columns_and_failures_are_lines(sweep: tuple[Sweep, SweepState]):
    loaded, state = sweep
    for seed in (1, 2, 3):
        judged = evaluation({"kl": 0.3 + seed / 100, "perplexity": 123.45 + seed}, {"arc": 0.6 + seed / 100})
        finish(output_of(loaded.output, f"good{seed}"), judged, seconds=4000 + seed)
        state.note(f"good{seed}", "complete")
        state.note(f"bad{seed}", "failed", "projector.kind is none, but the widths differ")
    result = read_sweep(loaded.output)
    console = Console(width=80, record=True, force_terminal=False)
    with console.capture() as captured:
        for table in sweep_tables(result):
            console.print(table)
    shown = captured.get()
    assert "125.45 ± 1.00" in shown
    assert "0.3200 ± 0.0100" in shown
    assert "62.0% ± 1.0%" in shown
    assert "67 min ± 1 s" in shown
    assert "…" not in shown
    assert "0 of 3" in shown
    assert "bad, seed 1, 2, 3: failed: projector.kind is none, but the widths differ" in list(sweep_lines(result))


def test_a_folder_without_a_sweep_is_said_to_have_none(tmp_path: Path):
    assert not is_sweep(tmp_path)
    with pytest.raises(RecipeError, match=r"no sweep in .*: it has no sweep\.json; run: coldstill ablate SWEEP\.yaml"):
        read_sweep(tmp_path)
    (tmp_path / "sweep.json").write_text('{"format": 99}')
    assert is_sweep(tmp_path)
    with pytest.raises(RecipeError, match=r"has format 99, this version reads 1"):
        read_sweep(tmp_path)


def test_a_sweep_remembers_how_runs_ended_and_adds_up_what_stage_one_did(sweep: tuple[Sweep, SweepState]):
    loaded, state = sweep
    summary = {"store": "s", "students": ["a/b"], "computed_tokens": 5, "written_bytes": 7, "seconds": 1.5}
    state.note("bad1", "failed", "why")
    state.note_precompute(summary, ["good1"])
    keys = {("good", 1): "good1", ("bad", 1): "bad1", ("bad", 2): "new"}
    keys |= {(name, seed): f"{name}{seed}" for name, seed in (("good", 2), ("good", 3), ("bad", 3))}
    again = SweepState(loaded, keys)
    again.note_precompute({**summary, "students": ["a/c"], "computed_tokens": 0}, ["new"])
    assert [again.status(key) for key in ("bad1", "new")] == ["failed", "pending"]
    written = json.loads((loaded.output / "sweep.json").read_text())
    assert (written["precompute"]["computed_tokens"], written["precompute"]["seconds"]) == (5, 3.0)
    assert written["runs"]["good1"]["student"] == "a/b"


@pytest.fixture
def base(model_folders: dict[str, Path]) -> dict[str, Any]:
    """A base recipe whose teacher is there."""
    student = {"prune": {"layers": {"remove": 1, "method": "last"}}}
    data = {**BASE["data"], "sequence_length": 24}
    return {**BASE, "teacher": {"path": str(model_folders["teacher"])}, "data": data, "student": student}


class Commands:
    """Stands for the processes that a sweep begins: remembers their arguments, and ends as it is told to.

    Where that is well, `evaluate` leaves what it found.
    """

    def __init__(self, refusals: dict[str, str]) -> None:
        self.refusals = refusals
        self.called: list[list[str]] = []

    def __call__(self, *arguments: str, on_start: Callable[[str], None]) -> Outcome:
        self.called.append([arguments[0], *(Path(file).stem for file in arguments[1:])])
        texts = "".join(Path(file).read_text() for file in arguments[1:])
        for words, error in self.refusals.items():
            if words in texts:
                return Outcome(None, error, True, ["said before", error])
        if arguments[0] == "evaluate":
            finish(Path(yaml.safe_load(texts)["output"]), evaluation({"kl": 0.5}), seconds=1)
        summary = {"students": ["s"] * (len(arguments) - 1), "computed_tokens": 1, "written_bytes": 1, "seconds": 1.0}
        return Outcome(summary, None, False, [])


def test_what_stage_one_refuses_of_one_variant_fails_that_one_until_it_is_told_to_retry(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, base: dict[str, Any]
):
    commands = Commands({"text_column: nope": "no column nope"})
    monkeypatch.setattr("coldstill.pipeline.sweeps.stages.run_command", commands)
    path = write(recipe=base, seeds=[1, 2], variants={"near": {}, "far": {"data.train.text_column": "nope"}})
    said: list[str] = []
    result = ablate(path, say=said.append)
    near, far = result.variants
    assert [run.error for run in far.runs] == ["no column nope"] * 2
    keys = [[run.key for run in variant.runs] for variant in (near, far)]
    stage_one, rest = commands.called[:3], commands.called[3:]
    assert stage_one == [
        ["precompute", keys[0][0], keys[1][0], keys[0][1], keys[1][1]],
        ["precompute", *keys[0]],
        ["precompute", *keys[1]],
    ]
    assert rest == [[command, key] for key in keys[0] for command in ("train", "evaluate")]
    assert "far, seed 1: failed: no column nope" in said
    assert (result.folder / "logs" / f"{keys[1][0]}.log").read_text() == "said before\nno column nope\n"

    commands.called.clear()
    ablate(path)
    assert all(keys[1][0] not in call and keys[1][1] not in call for call in commands.called)
    commands.refusals.clear()
    assert [run.error for run in ablate(path, retry=True).variants[1].runs] == [None, None]
    assert ["train", keys[1][0]] in commands.called


def test_what_stage_one_refuses_for_all_ends_the_sweep_and_fails_none(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, base: dict[str, Any]
):
    commands = Commands({base["teacher"]["path"]: "no network"})
    monkeypatch.setattr("coldstill.pipeline.sweeps.stages.run_command", commands)
    path = write(recipe=base, variants={"near": {}, "far": {"data.train.text_column": "nope"}})
    with pytest.raises(RecipeError, match=r"^stage one of .*/out: no network$"):
        ablate(path)
    assert {call[0] for call in commands.called} == {"precompute"}
    runs = [run for variant in read_sweep(path.parent / "out").variants for run in variant.runs]
    assert [run.status for run in runs] == ["pending", "pending"]


@pytest.mark.parametrize(
    ("program", "error", "is_refusal"),
    [
        (
            "e.write('coldstill: loss.k has no effect\\ncoldstill: no store\\n'); exit(2)",
            "no store",
            1,
        ),
        ("1 / 0", "ZeroDivisionError: division by zero", 0),
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL, as when memory runs out", 0),
        ("e.write('\\r 10%\\r 20%'); e.write('\\rworse\\n'); exit(3)", "worse", 0),
        ("exit(3)", "exit code 3", 0),
    ],
)
def test_the_end_of_a_process_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, error: str, is_refusal: int
):
    file = tmp_path / "program.py"
    file.write_text(f"import os, sys; e = sys.stderr\n{program}\n")
    tokens: list[str] = []
    monkeypatch.setattr("coldstill.pipeline.runtime.program.PROGRAM", (str(file),))
    outcome = run_command("train", on_start=tokens.append)
    assert (outcome.summary, outcome.error, outcome.is_refusal) == (None, error, bool(is_refusal))
    assert is_dead(tokens[0])


def test_a_second_process_is_refused_in_one_line_until_the_first_is_gone(forks: Forks, tmp_path: Path):
    with subprocess.Popen(forks.command("sweep_holder", tmp_path), stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        held_by = forks.pid_behind(holder.pid)
        with pytest.raises(InUseError) as raised, hold_sweep(tmp_path):
            pytest.fail("two processes hold one sweep")
        os.kill(held_by, signal.SIGKILL)
    expected = f"sweep {tmp_path} is carried out by process {held_by} already; wait for it, or stop it"
    assert str(raised.value) == expected
    with hold_sweep(tmp_path):
        pass


@pytest.mark.parametrize("path", sorted((CONFIGS / "sweeps").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_sweep_loads_with_three_seeds_and_a_folder_of_its_own(path: Path):
    sweep = load_sweep(path)
    assert sweep.output == Path("runs") / path.stem
    assert all(list(variant.recipes) == [1, 2, 3] for variant in sweep.variants)


def recipes_of(name: str) -> dict[str, Any]:
    return {variant.name: variant.recipes[1] for variant in load_sweep(CONFIGS / "sweeps" / f"{name}.yaml").variants}


def test_the_shipped_sweeps_compare_what_they_say():
    losses = recipes_of("losses")
    ever = {
        name: [recipe.loss.ever(weight) for weight in ("alpha", "beta", "gamma")] for name, recipe in losses.items()
    }
    assert ever == {
        "task": [True, False, False],
        "logits": [False, True, False],
        "task+logits": [True, True, False],
        "hidden": [False, False, True],
        "logits+hidden": [False, True, True],
        "all": [True, True, True],
    }
    mapping = recipes_of("mapping")
    assert {recipe.mapping.strategy for recipe in mapping.values()} == {"uniform", "last", "kept", "covered"}
    assert len({sweep_key(recipe) for recipe in mapping.values()}) == 5, "four with features, one without"
    projectors = recipes_of("projectors")
    assert projectors["none"].projector.kind == "none"
    assert [recipe.projector.learnable for recipe in projectors.values()] == [True, False, False, True, True]
    assert all(recipe.student.prune.hidden.size == 448 for recipe in projectors.values())
    assert [recipe.loss.temperature for recipe in recipes_of("temperature").values()] == [1, 2, 3, 4]
    logits = [(recipe.targets.logits.kind, recipe.targets.logits.encoding) for recipe in recipes_of("logits").values()]
    assert logits == [("topk", "coded"), ("topk_sampled", "coded"), ("final", "coded"), ("final", "int8")]
    data = recipes_of("data")
    assert data["textbook, half"].data.train.max_rows * 2 == data["web (SlimPajama)"].data.train.max_rows
    assert len({recipe.data.eval.path for recipe in data.values()}) == 1


def test_the_shipped_recipes_of_classic_set_ups_say_what_they_are_known_for():
    qwen, narrow = (load_recipe(CONFIGS / f"qwen2.5-0.5b-{kind}.yaml") for kind in ("depth", "width"))
    assert {qwen.teacher.path, narrow.teacher.path} == {"Qwen/Qwen2.5-0.5B"}
    assert qwen.student.prune.layers.remove == 24 - 20
    assert narrow.student.prune.hidden.size == 640
    assert {recipe.data.train.name for recipe in (qwen, narrow)} == {"wikitext-2-raw-v1"}
    last, glu = (load_recipe(CONFIGS / f"llama-3.2-1b-{kind}.yaml") for kind in ("last-blocks", "glu"))
    assert last.student.prune.layers.method == "last"
    assert glu.student.prune.mlp.keep == pytest.approx(240 / 350, abs=1e-3)
    for recipe in (last, glu):
        assert recipe.teacher.path == "meta-llama/Llama-3.2-1B"
        assert recipe.data.train.path == "HuggingFaceTB/cosmopedia"
        assert recipe.train["num_train_epochs"] == 3
        assert recipe.train["per_device_train_batch_size"] * recipe.train["gradient_accumulation_steps"] == 32
        assert recipe.train["learning_rate"] == 1e-4
    gemma = load_recipe(CONFIGS / "gemma-3-270m-depth.yaml")
    assert gemma.student.prune.layers.remove == 18 - 14
    assert gemma.data.train.max_rows == 40_000
    assert gemma.loss.divergence == "skewed_kl"
    assert gemma.loss.delta > 0
