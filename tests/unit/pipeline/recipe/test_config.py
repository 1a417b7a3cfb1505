"""The recipe: overrides, numbers as people write them, and one helpful line for each mistake."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from coldstill.pipeline.recipe.file import dump_recipe, load_recipe, parse_recipe
from coldstill.pipeline.recipe.yaml_text import parse_yaml
from coldstill.pipeline.runtime.errors import RecipeError

ROOT = Path(__file__).parents[4]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture
def data() -> dict[str, Any]:
    return {
        "output": "runs/x",
        "teacher": {"path": "somewhere"},
        "data": {"train": {"path": "text"}, "eval": {"path": "json"}},
        "student": {"prune": {"layers": {"remove": 2}}},
    }


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_recipe_loads_and_reads_back_from_its_resolved_form(path: Path, tmp_path: Path):
    recipe = load_recipe(path)
    resolved = tmp_path / "recipe.yaml"
    resolved.write_text(dump_recipe(recipe))
    assert load_recipe(resolved) == recipe.model_copy(update={"train": recipe.training})


def test_the_recipes_for_real_runs_are_shipped():
    assert {"cosmopedia.yaml", "demo.yaml", "slimpajama.yaml", "wikitext2.yaml"} <= {path.name for path in SHIPPED}


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("2E5", 2e5), ("-1.5e+3", -1500.0), ("1e", "1e"), ("3", 3)]
)
def test_numbers_are_numbers_as_a_person_writes_them(text, value):
    assert parse_yaml(f"x: {text}", name="r") == {"x": value}


def test_overrides_change_nested_keys_and_make_missing_sections(data, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(data))
    recipe = load_recipe(path, ["loss.temperature=3", "train.learning_rate=1e-4", "targets.logits.temperatures=[1, 3]"])
    assert recipe.loss.temperature == 3.0
    assert recipe.train == {"learning_rate": 1e-4}
    assert recipe.targets.logits.temperatures == [1.0, 3.0]


WRONG = [
    ({"zzz": 1}, "unknown key 'zzz' in r; known keys: output, cache, local_copy, teacher"),
    ({"teacher.bacth_size": 1}, "unknown key 'teacher.bacth_size' in r; did you mean 'batch_size'?"),
    ({"student.prune.layers.metod": "x"}, "unknown key 'student.prune.layers.metod' in r; did you mean 'method'?"),
    ({"teacher.path": None}, "teacher.path in r: Input should be a valid string, got None"),
    ({"teacher": {}}, "missing key 'teacher.path' in r"),
    ({"loss.alpha": -1}, "loss.alpha in r: Input should be greater than or equal to 0, got -1"),
    ({"loss": {"alpha": 0, "beta": 0, "gamma": 0}}, "loss in r: alpha, beta, gamma and delta are all 0"),
    ({"targets.hidden.blocks": "none", "loss": {"gamma": 0, "delta": 1}}, "r: loss.delta is above 0 but targets."),
    ({"loss.schedule.gamma": {"shape": "linear"}}, "loss.schedule.gamma in r: shape linear needs end"),
    ({"loss.schedule.gamma": {"shape": "constant", "end": 1}}, "loss.schedule.gamma in r: shape constant takes no end"),
    ({"loss.schedule.gamma": {"shape": "exponential", "end": 1}}, "loss.schedule.gamma.shape in r: Input should be "),
    ({"loss.schedule.temperature": {"end": 0}}, "loss.schedule.temperature.end in r: Input should be greater than 0"),
    (
        {"targets.logits": {"kind": "topk"}, "loss.temperature": 2, "loss.schedule.temperature": {"end": 1}},
        "r: loss.schedule.temperature ",
    ),
    ({"loss.schedule.kappa": {"end": 1}}, "unknown key 'loss.schedule.kappa' in r; did you mean 'alpha'?"),
    ({"loss.schedule.beta": {"end": 1, "warmup": 1}}, "loss.schedule.beta.warmup in r: Input should be less than 1"),
    ({"student.lora": {"rank": 8}}, "student.lora in r: unknown key 'student.lora.rank': peft's LoraConfig"),
    ({"student.lora": {"task_type": "x"}}, "student.lora in r: student.lora.task_type is decided by the student"),
    ({"student.path": "x"}, "student in r: student takes exactly one of path"),
    ({"student.prune.layers": {"method": "explicit"}}, "student.prune.layers in r: method explicit takes blocks"),
    ({"student.prune.layers": {"method": "last"}}, "student.prune.layers in r: method last takes remove"),
    ({"mapping.strategy": "pairs"}, "mapping in r: pairs, a map from student block to teacher block"),
    ({"targets.logits.kind": "none"}, "r: loss.beta is above 0 but targets.logits.kind is none"),
    ({"targets.hidden.blocks": "none", "loss.gamma": 0.1}, "r: loss.gamma is above 0 but targets.hidden.blocks is no"),
    ({"targets.hidden.blocks": [-1]}, "targets.hidden.blocks in r: Input should be 'mapped' or 'none', got [-1]"),
    ({"targets.logits.temperatures": [2, 2]}, "targets.logits.temperatures in r: needs at least one temperature"),
    ({"targets.logits.kind": "top"}, "targets.logits.kind in r: Input should be 'topk', 'topk_sampled', 'final' "),
    ({"targets.logits.values": "float16"}, "targets.logits.values in r: Input should be 'delta' or 'float32'"),
    ({"targets.logits.step": 0}, "targets.logits.step in r: Input should be greater than 0, got 0"),
    ({"targets.logits.samples": 0}, "targets.logits.samples in r: Input should be greater than 0, got 0"),
    ({"targets.logits.encoding": "bfloat16"}, "targets.logits.encoding in r: Input should be 'coded', 'int8', "),
    ({"targets.hidden.step": 0}, "targets.hidden.step in r: Input should be greater than 0, got 0"),
    ({"targets.hidden.token_fraction": 0}, "targets.hidden.token_fraction in r: Input should be greater than 0, got 0"),
    ({"targets.hidden.token_fraction": 1.5}, "targets.hidden.token_fraction in r: Input should be less than or "),
    ({"loss.divergence": "kl"}, "loss.divergence in r: Input should be 'forward_kl', 'reverse_kl', "),
    ({"loss.divergence_weight": 0.5}, "loss in r: divergence_weight has no effect on forward_kl; it belongs to "),
    ({"loss": {"divergence": "selective", "divergence_weight": 0.5}}, "loss in r: divergence_weight has no effect on "),
    ({"loss": {"divergence": "skewed_kl", "divergence_weight": 1}}, "loss.divergence_weight in r: Input should "),
    ({"data.eval.path": "text"}, "data in r: train and eval read the same source, so eval.max_rows must say"),
    ({"data.eval": []}, "data in r: eval is an empty list: name a source, or several"),
    ({"data.eval": "text"}, "data.eval in r: Input should be a valid dictionary or instance of SourceConfig, got 'tex"),
    ({"data.eval.label": "x"}, "unknown key 'data.eval.label' in r; known keys: path, name, data_dir, data_files, "),
    ({"data.eval": [{"path": "x"}, {"pat": "y"}]}, "unknown key 'data.eval.1.pat' in r; did you mean 'path'? (and 1 "),
    ({"data.eval": [{"name": "x"}]}, "missing key 'data.eval.0.path' in r"),
    ({"data.eval": [{"path": "x", "label": "a/b"}]}, "data.eval.0.label in r: String should match pattern"),
    ({"data.eval": [{"path": "x"}, {"path": "text"}]}, "data in r: train and eval read the same source, so eval.max_"),
    ({"data.eval": [{"path": "x"}, {"path": "a/x"}]}, "data in r: eval has two sources that are called 'x': give one"),
    ({"data.eval": [{"path": "x"}, {"path": "x", "label": "y"}]}, "data in r: eval reads the same source as 'x' and "),
    ({"data.train.prompt_column": "q"}, "data in r: prompt_column needs one document a row: set data.packing to false"),
    ({"data.prompt_weight": 1.5}, "data.prompt_weight in r: Input should be less than or equal to 1, got 1.5"),
    ({"data.prompt_weight": -0.5}, "data.prompt_weight in r: Input should be greater than or equal to 0, got -0.5"),
    ({"train.lerning_rate": 1}, "train in r: unknown key 'train.lerning_rate': transformers' Training"),
    ({"train.output_dir": "x"}, "train in r: train.output_dir is decided by the recipe's output; remove it"),
    ({"train.activation_checkpointing": "half"}, "train in r: train.activation_checkpointing must be true, false or "),
    ({"train.gradient_checkpointing": "selective"}, "train in r: train.gradient_checkpointing must be of type bool"),
    ({"train.bf16": "yes"}, "train in r: train.bf16 must be of type bool, got 'yes'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"), WRONG, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_each_mistake_is_one_line_that_names_the_key(data, changes, message):
    for dotted, value in changes.items():
        section = data
        *parents, last = dotted.split(".")
        for part in parents:
            section = section.setdefault(part, {})
        section[last] = value
    with pytest.raises(RecipeError) as caught:
        parse_recipe(data, name="r")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "label"),
    [
        ({"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}, "wikitext-2-raw-v1"),
        ({"path": "owner/fine web"}, "fine-web"),
        ({"path": "builtin:python-docs"}, "python-docs"),
        ({"path": "texts/held out.jsonl"}, "held-out"),
        ({"path": "text", "data_files": ["texts/a.txt", "texts/b.txt"]}, "a"),
        ({"path": "text", "data_files": "texts/*.txt"}, "text"),
        ({"path": "text", "data_files": "a.txt", "label": "mine"}, "mine"),
    ],
)
def test_a_source_among_several_is_called_after_what_it_is_read_from(data, source, label):
    data["data"]["eval"] = [source]
    assert parse_recipe(data, name="r").data.eval_labels == [label]


def test_domains_are_others_where_they_are_no_split_of_trains_own_data_set(data):
    data["data"]["train"] = {"path": "set", "name": "a"}
    own, same_name, other = {"path": "set", "name": "a", "split": "test"}, {"path": "set", "name": "b"}, {"path": "c"}
    for given, others in (([own, same_name, other], ["b", "c"]), ([own], ["a"]), ({"path": "c"}, [])):
        data["data"]["eval"] = given
        assert parse_recipe(data, name="r").data.other_labels == others


@pytest.mark.parametrize(
    ("kind", "k", "message"),
    [
        ("topk", 385, "targets.logits.k is 385, but the teacher's vocabulary has 384 entries"),
        ("topk_sampled", 384, "has 384 entries: no tail is left to draw from"),
        ("topk_sampled", 500, "targets.logits.k is 500, but the teacher's vocabulary has 384 entries"),
    ],
)
def test_more_tokens_than_the_teacher_has_are_refused_before_any_work(
    write_recipe: Callable[..., Path], coldstill: Callable[..., Any], workplace: Path, kind: str, k: int, message: str
):
    recipe = write_recipe(targets__logits={"kind": kind, "k": k, "temperatures": [1, 2]})
    said = coldstill("precompute", recipe, expect=2).stderr
    assert said.strip().endswith(message)
    assert said.count("\n") == 1
    assert not (workplace / "caches").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "is not YAML"), ("- 1", "must be a map of sections, got list"), (None, "no recipe at")],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, message):
    path = tmp_path / "r.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


@pytest.mark.parametrize("override", ["loss", "loss.=3", "output.x=3"])
def test_an_override_of_another_form_is_refused(data, tmp_path, override):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(RecipeError, match="override '"):
        load_recipe(path, [override])


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"targets__logits": {"kind": "final", "k": 8}}, "targets.logits.k has no effect: kind is final"),
        ({"targets__logits": {"kind": "final", "encoding": "int8", "step": 0.1}}, "targets.logits.step has no effect"),
        ({"targets__logits": {"kind": "topk", "samples": 8}}, "targets.logits.samples has no effect: kind is topk"),
        ({"targets__hidden": {"step": 0.1}}, "targets.hidden.step has no effect: encoding is int8"),
        ({"data__prompt_weight": 0.5}, "data.prompt_weight has no effect: no source names a prompt_column"),
        ({"loss__dynamics": "mse"}, "loss.dynamics has no effect: delta is 0"),
        ({"projector__init_rows": 4}, "projector.init_rows has no effect: init is xavier"),
        ({"projector": {"kind": "none", "init": "least_squares"}}, "projector.init has no effect: kind is none"),
        ({"loss__gamma": 0, "projector__init": "least_squares"}, "projector.init has no effect: gamma and delta"),
        ({"loss__selective_k": 4}, "loss.selective_k has no effect: divergence is forward_kl"),
    ],
)
def test_a_key_without_effect_is_noted(write_recipe: Callable[..., Path], changes: dict[str, Any], note: str):
    (said,) = load_recipe(write_recipe(**changes)).idle_keys()
    assert said.startswith(note)


def test_a_recipe_whose_keys_all_count_has_no_note(write_recipe: Callable[..., Path]):
    assert load_recipe(write_recipe()).idle_keys() == []


@pytest.mark.parametrize("step", [1e-5, 0.03123456789])
def test_a_number_that_cannot_stand_in_a_columns_name_is_refused(write_recipe: Callable[..., Path], step: float):
    with pytest.raises(
        RecipeError, match=r"targets\.logits\.step in .*: is part of a column's name: at most six digits"
    ):
        load_recipe(write_recipe(targets__logits={"kind": "final", "step": step}))


@pytest.fixture
def load(data: dict[str, Any], tmp_path: Path) -> Callable[..., Any]:
    """Write the recipe, and load it with overrides."""
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({**data, "loss": {"alpha": 0.5}}))
    return lambda *overrides: load_recipe(path, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.alhpa=1"], "^unknown key 'loss.alhpa' in override 'loss.alhpa=1'; did you mean 'alpha'"),
        (["loss={alhpa: 1}"], "^unknown key 'loss.alhpa' in override 'loss={alhpa: 1}'; did you mean 'alpha'"),
        (["lss.alpha=1"], "^unknown key 'lss' in override 'lss.alpha=1'; did you mean 'loss'"),
        (["alpha=1"], "^unknown key 'alpha' in override 'alpha=1'; did you mean 'loss.alpha'"),
        (["loss.alpha=-1"], "^loss.alpha in override 'loss.alpha=-1': .*, got -1"),
        (["train.learning_rte=1"], "^train in override 'train.learning_rte=1': unknown key 'train.learning_rte'"),
        (["targets.logits.kind=none"], "^override 'targets.logits.kind=none': loss.beta is above 0 but"),
        (["data={}"], "^missing key 'data.train' in override 'data={}'"),
        (["loss.alpha=1", "loss.beta=-2"], "^loss.beta in override 'loss.beta=-2'"),
    ],
)
def test_what_an_override_did_is_not_blamed_on_the_file(load: Callable[..., Any], overrides: list[str], message: str):
    with pytest.raises(RecipeError, match=message):
        load(*overrides)


def test_what_the_file_did_is_not_blamed_on_an_override(data: dict[str, Any], tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({**data, "loss": {"alhpa": 0.5}}))
    with pytest.raises(RecipeError, match=f"unknown key 'loss.alhpa' in {path}; did you mean 'alpha'"):
        load_recipe(path, ["loss.beta=1", "train.seed=3"])


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["loss.alpha=1", "loss.alpha=2"], "loss.alpha"),
        (["loss.alpha=1", "train.seed=1", "loss={gamma: 0}"], "loss.alpha"),
        (["loss={alpha: 1, gamma: 0}", "loss.gamma=1"], "loss.gamma"),
        (["mapping={strategy: pairs, pairs: {0: 1}}", "mapping.pairs={0: 2}"], "mapping.pairs.0"),
    ],
)
def test_an_override_that_another_undoes_is_refused_with_both(load: Callable[..., Any], overrides: list[str], key: str):
    message = f"override {overrides[0]!r} is undone by override {overrides[-1]!r}: {key} is given twice"
    with pytest.raises(RecipeError, match=re.escape(message)):
        load(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss.alpha=1", "loss.alpha=1"],
        ["loss={gamma: 0}", "loss.alpha=1"],
        ["loss={}", "loss.alpha=1"],
        ["student=null", "student.path=there"],
        ["mapping={strategy: pairs, pairs: {0: 1, 1: 3}}", "loss.alpha=1"],
    ],
)
def test_overrides_that_add_to_each_other_are_taken(load: Callable[..., Any], overrides: list[str]):
    load(*overrides)


def test_a_key_twice_in_an_override_is_refused(load: Callable[..., Any]):
    with pytest.raises(RecipeError, match="^key 'loss.alpha' is given twice in override 'loss={alpha: 1, alpha: 2}'"):
        load("loss={alpha: 1, alpha: 2}")


def test_a_home_is_a_home_wherever_a_recipe_names_a_place(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/somebody")
    places = [f"{key}=~/x" for key in ("output", "cache", "local_copy", "evaluate.include_path")]
    recipe = load(*places, "evaluate.tasks=[arc_easy, ~/mine.yaml]")
    assert {recipe.output, recipe.cache, recipe.local_copy, recipe.evaluate.include_path} == {"/somebody/x"}
    assert recipe.evaluate.tasks == ["arc_easy", "/somebody/mine.yaml"]
    assert load("cache=s3://bucket/~x").cache == "s3://bucket/~x"


def test_the_home_of_nobody_is_no_folder_of_that_name(load: Callable[..., Any]):
    with pytest.raises(RecipeError, match="cache .*: there is no user 'nobody-here' on this machine"):
        load("cache=~nobody-here/x")


FILES = {
    "empty": ("# nothing yet\n", "recipe .*r.yaml is empty"),
    "list": ("- a\n", "recipe .*r.yaml must be a map of sections, got list"),
    "tab": ("output: x\nloss:\n\talpha: 1\n", "recipe .*r.yaml is not YAML: line 3 has a tab"),
    "twice": ("output: x\noutput: y\n", "key 'output' is given twice in recipe .*r.yaml: line 1 and line 2"),
    "sweep": (
        "output: runs/s\nrecipe: base.yaml\nvariants: {}\n",
        "r.yaml is a sweep, which coldstill ablate .*r.yaml carries out; its report: coldstill report runs/s",
    ),
}


@pytest.mark.parametrize(("text", "message"), FILES.values(), ids=FILES)
def test_a_file_that_is_no_recipe_is_said_to_be_what_it_is(tmp_path: Path, text: str, message: str):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_a_folder_is_no_recipe_and_that_of_a_run_has_one(tmp_path: Path):
    with pytest.raises(RecipeError, match=f"{tmp_path} is a folder, and a recipe is a YAML file$"):
        load_recipe(tmp_path)
    (tmp_path / "student").mkdir()
    (tmp_path / "student/recipe.yaml").touch()
    with pytest.raises(RecipeError, match=f"the one that made what is there: {tmp_path}/student/recipe.yaml"):
        load_recipe(tmp_path)
