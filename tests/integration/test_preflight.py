"""What can be known before the teacher runs is said before it runs, and before training what training needs."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import text_data
from training import gradients, trainer_of

from coldstill.pipeline.precompute import precompute
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.runtime.errors import RecipeError
from coldstill.pipeline.stage_two.distillation_trainer import UniversalDistillationTrainer
from coldstill.pipeline.stage_two.run_folder import claimed_run
from coldstill.pipeline.train import train

LORA = {"r": 4, "target_modules": ["q_proj"]}

# Wrong on every machine: refused by the dry run and by training alike, in one line that begins so.
ALWAYS = [
    (["train.optim=foo"], "train: foo is not a valid OptimizerNames"),
    (["train.optim=galore_adamw"], "train: You need to install `galore_torch`"),
    (["train.optim=adamw_anyprecision"], "train: Please install https://github.com/pytorch/torchdistx"),
    (["train.optim=sgd", "train.optim_args=momentum=x"], "train: could not convert string to float: 'x'"),
    (["train.lr_scheduler_type=foo"], "train: foo is not a valid SchedulerType"),
    (["train.lr_scheduler_type=cosine_with_min_lr"], "train: One of min_lr or min_lr_rate should be set"),
    (["train.lr_scheduler_kwargs={a: 1}"], "train: get_cosine_schedule_with_warmup() got an unexpected keyword "),
    (["train.lr_scheduler_type=reduce_lr_on_plateau"], "train: lr_scheduler_type reduce_lr_on_plateau requires an "),
    (["train.report_to=foo"], "train: foo is not supported, only"),
    (["train.report_to=[mlflow, tensorboard]"], "train.report_to names mlflow, which is not installed; run: pip "),
    (["train.report_to=azure_ml"], "train.report_to names azure_ml, which is not installed; run: pip install azureml"),
    (["train.report_to=flyte"], "train.report_to names flyte, which is not installed; run: pip install flytekit"),
    (["train.save_strategy=foo"], "train: foo is not a valid SaveStrategy"),
    (["train.load_best_model_at_end=true"], "train: train.load_best_model_at_end requires the save and eval strategy"),
    (["train.deepspeed=x.json"], "train.deepspeed needs DeepSpeed, which is not installed; run: pip install deepspeed"),
    (["train.accelerator_config=nowhere.json"], "train: [Errno 2] No such file or directory: 'nowhere.json'"),
    (["train.accelerator_config={foo: 1}"], "train: AcceleratorConfig.__init__() got an unexpected keyword"),
    (["train.activation_checkpointing_kwargs={foo: 1}"], "train.activation_checkpointing_kwargs has no foo"),
    (["train.torch_compile_backend=foo"], "train.torch_compile_backend 'foo' is unknown; one of "),
    (["train.torch_compile=true", "train.torch_compile_mode=foo"], "train.torch_compile_mode 'foo': Unrecognized mode"),
    (["train.dataloader_drop_last=true", "train.per_device_train_batch_size=99"], "train.dataloader_drop_last drops "),
    (["mapping.num_pairs=1", "loss.delta=1"], "loss.delta compares changes from one mapped block to the next"),
    (["targets.hidden.blocks=[0]"], "the mapping needs teacher block 1, but targets.hidden.blocks stores [0]"),
    (["mapping.strategy=pairs", "mapping.pairs={0: 4}"], "mapping.pairs"),
    (["student.lora={r: 4, target_modules: [nothing]}"], "student.lora: Target modules {'nothing'} not found"),
    (["student.lora={r: 4, target_modules: [q_proj], layers_to_transform: [3]}"], "student.lora: Target modules "),
    (["student.lora={r: 0}"], "student.lora: `r` should be a positive integer"),
    (["student.lora={r: 4, target_modules: [q_proj], bias: foo}"], "student.lora: Requested bias: foo"),
    (["output=/proc/x"], "output /proc/x cannot be written: /proc is on proc, a file system of the kernel's own"),
    (["output={place}/text.txt"], "output {place}/text.txt cannot be written: {place}/text.txt is no folder"),
    (["output={place}/text.txt/run"], "output {place}/text.txt/run cannot be written: {place}/text.txt is no folder"),
    (["output={place}/caches/run"], "output {place}/caches/run is inside cache {place}/caches: give each a folder"),
    (["output={place}"], "cache {place}/caches is inside output {place}: give each a folder of its own"),
    (["output={place}/teacher/run"], "output {place}/teacher/run is inside teacher.path {place}/teacher, which "),
    (["output=s3://bucket/run"], "output is a local folder, got s3://bucket/run; only cache may be a URL"),
    (["local_copy=/sys/x"], "local_copy /sys/x cannot be written: /sys is on sysfs"),
    (["local_copy={place}/run/copies"], "local_copy {place}/run/copies is inside output {place}/run"),
    (["cache=foo://bucket"], "foo://bucket cannot be opened: ValueError: Protocol not known: foo"),
    (["cache=gs://bucket"], "gs://bucket needs a library that is not installed: Please install gcsfs"),
]  # fmt: skip

# Wrong here: the dry run asks no more of this machine than that it run the teacher.
ONLY_HERE = [
    ("train.fp16=true", "train.fp16 needs an accelerator, and this machine trains on its CPU, which would compute in "),
    ("train.tf32=true", "train.tf32 needs an NVIDIA GPU of Ampere or later, and this machine has none"),
]
NEEDS_NO_GPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="says what a machine without a GPU says")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model_folders: dict[str, Path], corpus: list[str]) -> Path:
    """A folder with a recipe whose stage one is complete; tests that change it change files of their own."""
    root = tmp_path_factory.mktemp("preflight")
    for name, folder in model_folders.items():
        (root / name).symlink_to(folder)
    recipe = {
        "output": str(root / "run"),
        "cache": str(root / "caches"),
        "teacher": {"path": str(root / "teacher"), "dtype": "float32"},
        "data": text_data(root, corpus, train_rows=12, eval_rows=4),
        "student": {"prune": {"layers": {"remove": 1, "method": "last"}, "reconstruct": False}},
        "mapping": {"strategy": "last"},
        "loss": {"alpha": 0.5, "beta": 0.5, "gamma": 0.1, "temperature": 2.0, "hidden": "mse"},
        "train": {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.001, "logging_steps": 1},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    precompute(load_recipe(root / "recipe.yaml"), show_progress=False)
    return root


@pytest.fixture
def untouched(place: Path) -> Iterator[None]:
    """Hold that a test writes nothing beside the recipe."""
    before = {file: file.stat().st_mtime_ns for file in place.rglob("*")}
    yield
    assert {file: file.stat().st_mtime_ns for file in place.rglob("*")} == before


def said_by(result: Any) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("coldstill: ")]


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(("overrides", "line"), ALWAYS, ids=lambda value: value[0] if isinstance(value, list) else "")
@pytest.mark.parametrize("command", [["precompute", "--dry-run"], ["train"]], ids=["dry-run", "train"])
def test_what_is_wrong_on_every_machine_is_one_line_before_each_stage(
    command: list[str],
    overrides: list[str],
    line: str,
    place: Path,
    coldstill: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
):
    for library in ("galore_torch", "gcsfs", "mlflow", "deepspeed"):
        monkeypatch.setitem(sys.modules, library, None)
    changes = [override.replace("{place}", str(place)) for override in overrides]
    result = coldstill(*command, place / "recipe.yaml", *changes, expect=2)
    (said,) = said_by(result)
    assert said.removeprefix("coldstill: ").startswith(line.replace("{place}", str(place)))


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("command", ["prune", "precompute", "plan"])
def test_whoever_runs_the_teacher_asks_before_it_runs(command: str, place: Path, coldstill: Callable[..., Any]):
    result = coldstill(command, place / "recipe.yaml", f"cache={place}/other", "train.optim=foo", expect=2)
    (said,) = said_by(result)
    assert said.startswith("coldstill: train: foo is not a valid OptimizerNames")


@pytest.mark.usefixtures("untouched")
def test_a_temperature_that_is_not_stored_is_refused_before_anything_runs(place: Path, coldstill: Callable[..., Any]):
    kind = "targets.logits={kind: topk, k: 16, temperatures: [1, 2]}"
    for command in (["precompute", "--dry-run"], ["precompute"], ["plan"], ["train"]):
        result = coldstill(*command, place / "recipe.yaml", kind, "loss.temperature=3", expect=2)
        (said,) = said_by(result)
        assert "loss.temperature 3 is not stored; targets.logits.temperatures has 1, 2: use one of these" in said


@pytest.mark.usefixtures("untouched")
def test_blocks_that_only_pruning_decides_are_no_fault_before_it(place: Path, coldstill: Callable[..., Any]):
    changes = [
        "student.prune.layers={remove: 1, method: importance}",
        "mapping.strategy=kept",
        "targets.hidden.blocks=[0]",
    ]
    coldstill("precompute", "--dry-run", place / "recipe.yaml", *changes)
    (said,) = said_by(
        coldstill("precompute", "--dry-run", place / "recipe.yaml", *changes, "mapping.num_pairs=1", "loss.delta=1",
                  expect=2)
    )  # fmt: skip
    assert "the mapping has one pair" in said


def test_blocks_that_pruning_decided_are_held_against_those_to_store_before_the_teacher_goes_on(
    place: Path, coldstill: Callable[..., Any], tmp_path: Path
):
    changes = [
        f"output={tmp_path}/run",
        f"cache={tmp_path}/caches",
        "student.prune.layers={remove: 1, method: importance}",
        "mapping.strategy=kept",
        "targets.hidden.blocks=[0]",
    ]
    (said,) = said_by(coldstill("precompute", place / "recipe.yaml", *changes, expect=2))
    assert said.startswith("coldstill: the mapping needs teacher block ")
    assert not (tmp_path / "caches" / "stores").exists()


@NEEDS_NO_GPU
@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(("override", "line"), ONLY_HERE, ids=lambda value: value.partition("=")[0])
def test_what_this_machine_lacks_for_training_is_a_note_in_stage_one_and_an_error_where_it_trains(
    override: str, line: str, place: Path, coldstill: Callable[..., Any]
):
    (note,) = said_by(coldstill("precompute", "--dry-run", place / "recipe.yaml", override))
    assert note.removeprefix("coldstill: ").startswith(line)
    assert note.endswith(", or train on another machine")
    for command in ("train", "plan"):
        (error,) = said_by(coldstill(command, place / "recipe.yaml", override, expect=2))
        assert error.removeprefix("coldstill: ").startswith(line)


@NEEDS_NO_GPU
@pytest.mark.usefixtures("untouched")
def test_a_device_that_is_not_there_is_refused_by_who_would_use_it(
    place: Path, coldstill: Callable[..., Any], tmp_path: Path
):
    missing = "is cuda, but this machine has no accelerator; use auto or cpu"
    for command in (["precompute", "--dry-run"], ["prune"], ["plan"]):
        (said,) = said_by(coldstill(*command, place / "recipe.yaml", "teacher.device=cuda", expect=2))
        assert said == f"coldstill: teacher.device {missing}"
    (note,) = said_by(coldstill("precompute", "--dry-run", place / "recipe.yaml", "evaluate.device=cuda"))
    assert note == f"coldstill: evaluate.device {missing}, or evaluate on another machine"
    (said,) = said_by(coldstill("evaluate", place / "recipe.yaml", "evaluate.device=cuda", expect=2))
    assert said == f"coldstill: evaluate.device {missing}"
    sweep = {"output": str(tmp_path / "sweep"), "recipe": str(place / "recipe.yaml")}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    (said,) = said_by(coldstill("ablate", tmp_path / "sweep.yaml", "evaluate.device=cuda", expect=2))
    assert said == f"coldstill: base, seed 42: evaluate.device {missing}"
    (said,) = said_by(coldstill("precompute", "--dry-run", place / "recipe.yaml", "evaluate.device=gpu", expect=2))
    assert said.startswith("coldstill: evaluate.device 'gpu' is no device that torch knows")


@NEEDS_NO_GPU
@pytest.mark.parametrize("has_instructions", [False, True])
def test_half_precision_on_a_processor_without_it_is_said_once(
    has_instructions: bool, place: Path, coldstill: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    found = {"architecture": "x86_64", "avx512_bf16": has_instructions, "avx512_fp16": has_instructions}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    slow = "is many times slower than float32 on this CPU, which has no instructions for it: set"
    expected = []
    for dtype in ("bfloat16", "float16"):
        changes = [f"teacher.dtype={dtype}", f"cache={tmp_path}/caches"]
        said = said_by(coldstill("precompute", "--dry-run", place / "recipe.yaml", *changes))
        expected = [f"coldstill: teacher.dtype {dtype} {slow} teacher.dtype=float32, which makes another store"]
        assert said == (expected if not has_instructions else [])
    said = said_by(coldstill("train", place / "recipe.yaml", "train.bf16=true", f"output={tmp_path}/run"))
    assert said == ([f"coldstill: train.bf16 {slow} train.bf16=false"] if not has_instructions else [])


def test_a_mistake_in_one_variant_ends_a_sweep_before_anything_runs(
    place: Path, coldstill: Callable[..., Any], tmp_path: Path
):
    variants = {"right": {}, "wrong": {"train.optim": "foo"}}
    sweep = {"output": str(tmp_path / "sweep"), "recipe": str(place / "recipe.yaml"), "variants": variants}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    change = f"cache={tmp_path}/caches"
    (said,) = said_by(coldstill("ablate", tmp_path / "sweep.yaml", change, expect=2))
    assert said.startswith("coldstill: wrong, seed 42: train: foo is not a valid OptimizerNames")
    assert not (tmp_path / "caches").exists()
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**sweep, "output": "/proc/x"}))
    (said,) = said_by(coldstill("ablate", tmp_path / "sweep.yaml", change, expect=2))
    assert said.startswith("coldstill: output /proc/x cannot be written: /proc is on proc")


def test_a_student_is_not_trained_over_itself(place: Path, coldstill: Callable[..., Any], tmp_path: Path):
    trained = tmp_path / "run" / "student"
    trained.parent.mkdir()
    trained.symlink_to(place / "narrow")
    changes = ["student={path: " + str(trained) + "}", "mapping.strategy=uniform", f"output={tmp_path}/run"]
    (said,) = said_by(coldstill("precompute", "--dry-run", place / "recipe.yaml", *changes, expect=2))
    assert "where training would replace it; choose another output" in said


@pytest.mark.parametrize("dies_at", [0, 1])
def test_an_output_belongs_to_a_run_when_it_has_taken_a_step(
    dies_at: int, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    step = UniversalDistillationTrainer.training_step

    def dying_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == dies_at:
            raise MemoryError
        return step(self, *args, **kwargs)

    recipe = load_recipe(place / "recipe.yaml", [f"output={tmp_path}/run"])
    with monkeypatch.context() as patched:
        patched.setattr(UniversalDistillationTrainer, "training_step", dying_step)
        with pytest.raises(MemoryError):
            train(recipe)
    assert (claimed_run(recipe) is None) == (dies_at == 0)
    smaller = load_recipe(place / "recipe.yaml", [f"output={tmp_path}/run", "train.per_device_train_batch_size=2"])
    if dies_at == 0:
        assert train(smaller).trained_steps == 3
        assert claimed_run(smaller)["train"]["per_device_train_batch_size"] == 2
    else:
        with pytest.raises(RecipeError, match="holds a run of another recipe"):
            train(smaller)


def test_a_run_that_fails_while_it_is_set_up_leaves_its_output_to_the_next(
    place: Path, coldstill: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "log").write_text("no folder")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "log"))
    changes = [f"output={tmp_path}/run"]
    coldstill("train", place / "recipe.yaml", *changes, "train.report_to=tensorboard", "loss.alpha=0.3", expect=2)
    assert "student" in coldstill("train", place / "recipe.yaml", *changes).stdout


# PEFT asks for a property of models by a name that transformers calls deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("student", [{}, {"lora": LORA}], ids=["whole", "lora"])
def test_neftune_adds_noise_while_it_trains_and_at_no_other_time(student: dict[str, Any], place: Path, tmp_path: Path):
    logs = []
    for name, change in (("plain", "train.run_name=x"), ("noisy", "train.neftune_noise_alpha=5")):
        changes = [f"output={tmp_path / name}", change, "train.eval_strategy=epoch", "train.eval_on_start=true"]
        changes += [f"student.{key}={value}" for key, value in student.items()]
        recipe = load_recipe(place / "recipe.yaml", changes)
        train(recipe)
        logs.append(json.loads((tmp_path / name / "train.json").read_text())["log"])
    plain, noisy = logs
    assert noisy[0]["eval_loss"] == plain[0]["eval_loss"]
    assert noisy[1]["loss"] != plain[1]["loss"]
    assert noisy[1]["loss"] == pytest.approx(plain[1]["loss"], rel=0.2)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    "changes", [["loss.delta=0.1"], ["train.activation_checkpointing=true"]], ids=["hooks", "checkpointing"]
)
def test_a_compiled_student_has_the_gradients_of_a_plain_one(changes: list[str], place: Path):
    def run(*more: str) -> tuple[dict[str, torch.Tensor], set[str]]:
        trainer = trainer_of(load_recipe(place / "recipe.yaml", [*changes, *more]))
        if trainer.args.gradient_checkpointing:
            trainer.model.activation_checkpointing_enable()
        with torch.profiler.profile() as profile:
            found = gradients(trainer)
        return found, {event.name.partition(":")[0] for event in profile.events()}

    want, plain = run()
    got, compiled = run("train.torch_compile_backend=eager")
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-7)
    assert "Torch-Compiled Region" not in plain
    assert "Torch-Compiled Region" in compiled


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_student_trains_compiled_by_inductor(place: Path, tmp_path: Path):
    recipe = load_recipe(place / "recipe.yaml", [f"output={tmp_path}/run", "train.torch_compile=true"])
    plain = load_recipe(place / "recipe.yaml", [f"output={tmp_path}/plain"])
    assert train(recipe).losses == pytest.approx(train(plain).losses, rel=1e-3)


def test_a_compiler_that_does_not_work_is_one_line(place: Path, coldstill: Callable[..., Any], tmp_path: Path):
    change = "train.torch_compile_backend=tvm"
    (said,) = said_by(coldstill("train", place / "recipe.yaml", f"output={tmp_path}/run", change, expect=2))
    assert said.startswith("coldstill: train.torch_compile: backend tvm does not work here: ")


def test_an_exported_student_generates_with_a_cache(place: Path, tmp_path: Path):
    summary = train(load_recipe(place / "recipe.yaml", [f"output={tmp_path}/run"]))
    assert json.loads((Path(summary.student) / "config.json").read_text())["use_cache"] is True
