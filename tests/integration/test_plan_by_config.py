"""A plan by a teacher's config alone: no weights are there, no text is read, and its numbers are those of real runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldstill.cache.manifest import Manifest
from coldstill.cache.store import CONSTANTS
from coldstill.pipeline.estimates.teacher_memory import TeacherMemory
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.outputs.run_index import find_run_rows
from coldstill.pipeline.recipe.file import load_recipe

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}
MACHINE = ("--flops", "400T", "--memory", "80GB", "--host-memory", "256GB", "--disk-rate", "2GB/s")


@pytest.fixture
def large(write_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A recipe whose teacher is the config of a Llama of 70B parameters, and whose text is not there."""

    def write(**changes: Any) -> Path:
        of_config = changes.pop("config", {})
        folder = tmp_path / "large"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**LLAMA_70B, **of_config}))
        (tmp_path / "text.txt").unlink()
        plain = {"teacher__path": str(folder), "teacher__dtype": "auto", "targets": {}, "loss": {}}
        return write_recipe(**plain, **{"data__sequence_length": 512, **changes})

    return write


def planned(coldstill: Callable[..., Any], recipe: Path, *arguments: str) -> dict[str, Any]:
    return json.loads(coldstill("plan", recipe, "--without-weights", "--json", *arguments).stdout)


def test_a_teacher_of_70b_and_a_billion_tokens_are_planned_by_its_config(
    large: Callable[..., Path], coldstill: Callable[..., Any], tmp_path: Path
):
    recipe = large()
    before = sorted(tmp_path.rglob("*"))
    plan = planned(coldstill, recipe, "--tokens", "1e9", *MACHINE)
    assert sorted(tmp_path.rglob("*")) == before, "a plan leaves something behind"
    assert (plan["num_parameters"], plan["num_blocks"], plan["dtype"]) == (70_553_706_496, 80, "bfloat16")
    assert plan["num_tokens"] == {"train": 10**9, "eval": 6 * 512}
    # Two operations for each parameter but embedding and head, 3% of them, and those of attention.
    assert plan["flops_per_token"]["train"] == pytest.approx(2 * 70.55e9, rel=0.03)
    assert plan["flops_per_token"]["eval"] - plan["flops_per_token"]["train"] == 2 * 8192 * 128256
    whole, streamed = plan["placements"]
    assert (whole["placement"], whole["weight_bytes"], whole["fits"]) == ("whole", 2 * 70_553_706_496, False)
    assert (streamed["placement"], streamed["fits"]) == ("streamed", True)
    # Two blocks, and embedding, head and norm.
    assert streamed["weight_bytes"] == 2 * 2 * 855_654_400 + 2 * (2 * 128256 + 1) * 8192
    assert streamed["super_batch_tokens"] == 262_144
    assert whole["hours"] == pytest.approx(2 * 70.55e9 * 1e9 / 400e12 / 3600, rel=0.03)
    assert streamed["hours"] == pytest.approx(whole["hours"], rel=0.01), "reading hides behind the work"
    slow = planned(coldstill, recipe, "--tokens", "1e9", *MACHINE[:4], "--host-memory", "8GB", "--disk-rate", "100MB")
    assert slow["placements"][1]["hours"] == pytest.approx(
        slow["placements"][1]["read_bytes"] / 100e6 / 3600, rel=0.01
    ), "there is not memory enough to hide it"


def test_the_tables_of_a_plan_by_config(large: Callable[..., Path], coldstill: Callable[..., Any]):
    output = coldstill("plan", large(), "--without-weights", "--tokens", "1e9").output
    assert "LlamaForCausalLM, 70,553,706,496 parameters, 80 blocks, bfloat16; by its config" in output
    assert "400.0 TFLOP/s, 80.0 GB beside 256.0 GB of the host, weights at 2.0 GB/s" in output
    assert "1,000,000,000 tokens at 138.2 GFLOP each" in output
    lines = {line.split("  ")[0]: line.split() for line in output.splitlines()}
    assert lines["fits"][1:] == ["no", "yes"]
    assert lines["weights at once"][3:] == ["141.1", "GB", "7.6", "GB"]
    assert "262,144 tokens" in output
    assert "4.3 GB on the GPU" in output


def test_bytes_by_config_are_the_most_that_a_real_store_has(
    write_recipe: Callable[..., Path], coldstill: Callable[..., Any]
):
    coded = {"encoding": "coded", "step": 0.03}
    recipe = write_recipe(targets={"logits": {"kind": "final", **coded}, "hidden": {"blocks": [0, 1, 2], **coded}})
    plan = planned(coldstill, recipe)
    coldstill("precompute", recipe)
    run = find_run_rows(load_recipe(recipe))
    manifest = Manifest(run.store)
    columns = {column["name"]: column for column in plan["columns"]}
    constants = [record for record in manifest.records() if record.shard == CONSTANTS]
    assert set(columns) == set(manifest.columns()) - {record.column.name for record in constants}
    assert plan["num_tokens"] == {split: run.selections[split].num_tokens for split in ("train", "eval")}
    for name, column in columns.items():
        records = [record for record in manifest.records() if record.column.name == name]
        assert column["num_tokens"] == sum(record.num_tokens for record in records)
        # What a few hundred tokens of noise take beyond: the frames of arrays that are nearly empty.
        assert sum(record.stored_bytes for record in records) <= 1.05 * column["most_bytes"] + 2_000
    assert sum(record.stored_bytes for record in constants) == pytest.approx(plan["constant_bytes"], rel=0.1)


def test_a_teacher_that_is_here_takes_the_memory_that_its_config_says(
    write_recipe: Callable[..., Path], coldstill: Callable[..., Any]
):
    recipe = write_recipe(teacher__placement="streamed")
    plan = planned(coldstill, recipe, "--host-memory", "1GB")
    memory = TeacherMemory.of(Teacher.locate(load_recipe(recipe).teacher))
    assert plan["placements"][1]["weight_bytes"] == memory.weight_bytes
    assert plan["num_blocks"] == memory.num_blocks


def test_blocks_that_only_pruning_decides_are_counted_together(
    large: Callable[..., Path], coldstill: Callable[..., Any]
):
    pruned = {"student": {"prune": {"layers": {"remove": 60}}}, "mapping": {"strategy": "kept"}}
    plan = planned(coldstill, large(**pruned, loss__gamma=0.1), "--tokens", "1e6")
    (column,) = [column for column in plan["columns"] if column["name"].startswith("hidden/")]
    assert column["name"] == "hidden/(20 blocks)/int8"
    assert column["most_bytes"] == pytest.approx(20 * 8192 * column["num_tokens"], rel=0.002)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--without-weights", "--flops", "fast"],
            "--flops 'fast' is no amount above 0; expected one such as 1e9 or 4TFLOP",
        ),
        (["--without-weights", "--memory", "80 parsecs"], "--memory '80 parsecs' is no amount above 0; expected"),
        (["--without-weights", "--disk-rate=0"], "--disk-rate '0' is no amount above 0; expected one such as"),
        (["--without-weights", "--tokens=-5"], "--tokens '-5' is no amount above 0; expected one such as"),
        (["--without-weights", "--budget", "5GB"], "--budget measures on rows, and --without-weights reads none"),
        (["--without-weights", "--rows", "5"], "--rows measures on rows, and --without-weights reads none"),
        (["--flops", "400T"], "--flops describes a machine to --without-weights; a plan with weights measures"),
        (["--without-weights", "teacher.path=/nowhere/at/all"], "no model folder at /nowhere/at/all"),
    ],
)
def test_what_goes_wrong_is_one_line(
    write_recipe: Callable[..., Path], coldstill: Callable[..., Any], arguments: list[str], said: str
):
    result = coldstill("plan", write_recipe(), *arguments, expect=2)
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"data__train__max_rows": None},
            "data.train.max_rows does not say how many rows there are: say --tokens",
        ),
        (
            {"config": {"quantization_config": {"quant_method": "gptq", "bits": 4}}},
            "large are quantised by gptq, and a",
        ),
        ({"targets__hidden": {"blocks": [80]}}, "targets.hidden.blocks names block 80; the teacher has blocks 0 to 79"),
        ({"data__sequence_length": 9000}, "data.sequence_length is 9000, but the teacher reads at most 8192 tokens"),
    ],
)
def test_what_such_a_teacher_cannot_do_is_one_line(
    large: Callable[..., Path], coldstill: Callable[..., Any], changes: dict[str, Any], said: str
):
    result = coldstill("plan", large(**changes), "--without-weights", expect=2)
    assert said in result.stderr
