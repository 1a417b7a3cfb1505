"""What a recipe can add to training: schedules, dynamics, LoRA, warm starts, selective checkpointing, unknown heads."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from training import gradients, train_and_die, trainer_of
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from coldstill.pipeline.evaluate import evaluate
from coldstill.pipeline.precompute import precompute
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.runtime.errors import RecipeError
from coldstill.pipeline.train import train

FINAL = {"targets__logits": {"kind": "final", "encoding": "float32"}}
SCHEDULED = {
    **FINAL,
    "loss__schedule": {
        "temperature": {"shape": "exponential", "end": 8.0},
        "gamma": {"shape": "linear", "end": 0.7},
        "beta": {"shape": "cosine", "end": 0.0, "warmup": 0.25},
    },
    "train__logging_steps": 1,
}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def log_of(workplace: Path, name: str = "run") -> list[dict[str, Any]]:
    return [entry for entry in json.loads((workplace / name / "train.json").read_text())["log"] if "loss" in entry]


def test_scheduled_values_are_logged_and_make_up_the_loss_of_their_step(
    write_recipe: Callable[..., Path], workplace: Path
):
    recipe = load_recipe(write_recipe(**SCHEDULED))
    precompute(recipe, show_progress=False)
    train(recipe)
    log = log_of(workplace)
    assert [entry["temperature"] for entry in log] == pytest.approx([2.0, 2 * 4 ** (1 / 3), 2 * 4 ** (2 / 3), 8.0])
    assert [entry["gamma"] for entry in log] == pytest.approx([0.1, 0.3, 0.5, 0.7])
    assert [entry["beta"] for entry in log] == pytest.approx([0.5, 0.5, 0.25, 0.0], abs=1e-9)
    for entry in log:
        parts = 0.5 * entry["loss_task"] + entry["beta"] * entry["loss_logits"] + entry["gamma"] * entry["loss_hidden"]
        assert entry["loss"] == pytest.approx(parts, rel=1e-5)


def test_a_scheduled_run_that_stops_goes_on_with_the_values_of_its_step(
    write_recipe: Callable[..., Path], workplace: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = load_recipe(write_recipe(output=str(workplace / "whole"), **SCHEDULED, train__save_steps=2))
    precompute(whole, show_progress=False)
    train(whole)
    stopped = load_recipe(write_recipe(**SCHEDULED, train__save_steps=2))
    train_and_die(stopped, at_step=3, monkeypatch=monkeypatch)
    assert train(stopped).trained_steps == 2
    for name, value in load_file(workplace / "whole/student/model.safetensors").items():
        assert torch.equal(load_file(workplace / "run/student/model.safetensors")[name], value)


def test_a_weight_that_begins_at_zero_still_has_its_targets_and_its_term(
    write_recipe: Callable[..., Path], workplace: Path
):
    changes = {"loss__gamma": 0.0, "loss__schedule": {"gamma": {"end": 1.0}}, "train__logging_steps": 1}
    recipe = load_recipe(write_recipe(**changes))
    precompute(recipe, show_progress=False)
    train(recipe)
    log = log_of(workplace)
    assert [entry["gamma"] for entry in log] == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0])
    assert all(entry["loss_hidden"] > 0 for entry in log)


def test_dynamics_are_a_term_of_their_own(write_recipe: Callable[..., Path], workplace: Path):
    recipe = load_recipe(write_recipe(loss__delta=0.3, loss__gamma=0.0, train__logging_steps=1))
    precompute(recipe, show_progress=False)
    train(recipe)
    for entry in log_of(workplace):
        assert "loss_hidden" not in entry
        parts = 0.5 * entry["loss_task"] + 0.5 * entry["loss_logits"] + 0.3 * entry["loss_dynamics"]
        assert entry["loss"] == pytest.approx(parts, rel=1e-5)
        assert 0 < entry["loss_dynamics"] < 2


def test_dynamics_of_one_mapped_block_are_refused(write_recipe: Callable[..., Path]):
    precompute(load_recipe(write_recipe()), show_progress=False)
    recipe = load_recipe(write_recipe(loss__delta=0.3, mapping__num_pairs=1))
    for stage in (precompute, train):
        with pytest.raises(RecipeError, match="loss.delta compares changes from one mapped block to the next"):
            stage(recipe)


def test_selective_checkpointing_gives_the_same_gradients_and_runs_only_cheap_operations_again(
    write_recipe: Callable[..., Path],
):
    plain = load_recipe(write_recipe())
    precompute(plain, show_progress=False)
    without = trainer_of(plain)
    with OperatorCounts() as want_counts:
        want = gradients(without)
    trainer = trainer_of(load_recipe(write_recipe(train__activation_checkpointing="selective")))
    assert trainer.args.gradient_checkpointing is True  # the name that every release of transformers 5 has
    # What the Trainer does at the beginning of training.
    trainer.model.activation_checkpointing_enable(
        activation_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs
    )
    with OperatorCounts() as counts:
        got = gradients(trainer)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-7)
    assert want_counts["aten::silu"] == 3, "one in each block"
    assert counts["aten::silu"] == 6
    for operator in ("aten::mm", "aten::_scaled_dot_product_flash_attention_for_cpu"):
        assert counts[operator] == want_counts[operator] > 0


class OperatorCounts(TorchDispatchMode):
    """Counts the operators that run, by name."""

    def __enter__(self) -> Counter[str]:
        super().__enter__()
        self._counts: Counter[str] = Counter()
        return self._counts

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._counts[function.name().partition(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def test_selective_checkpointing_trains(write_recipe: Callable[..., Path], workplace: Path):
    recipe = load_recipe(write_recipe(train__activation_checkpointing="selective"))
    precompute(recipe, show_progress=False)
    train(recipe)
    plain = load_recipe(write_recipe(output=str(workplace / "plain")))
    train(plain)
    for name, value in load_file(workplace / "plain/student/model.safetensors").items():
        torch.testing.assert_close(
            load_file(workplace / "run/student/model.safetensors")[name], value, rtol=1e-4, atol=1e-6
        )


# PEFT asks for a property of models by a name that transformers calls deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_trains_adapters_alone_and_exports_a_plain_student(write_recipe: Callable[..., Path], workplace: Path):
    recipe = load_recipe(write_recipe(student__lora=LORA, train__learning_rate=0.05))
    precompute(recipe, show_progress=False)
    trainable = {name for name, value in trainer_of(recipe).model.named_parameters() if value.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    summary = train(recipe)
    start = load_file(next((workplace / "caches/students").iterdir()) / "model.safetensors")
    exported = load_file(Path(summary.student) / "model.safetensors")
    assert exported.keys() == start.keys()
    moved = {name for name, value in exported.items() if not torch.equal(value, start[name])}
    assert moved == {name for name in start if any(module in name for module in LORA["target_modules"])}
    plain = AutoModelForCausalLM.from_pretrained(summary.student)
    base = AutoModelForCausalLM.from_pretrained(next((workplace / "caches/students").iterdir()))
    adapted = PeftModel.from_pretrained(base, workplace / "run/adapters").eval()
    ids = torch.arange(1, 13).unsqueeze(0)
    torch.testing.assert_close(plain(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    assert evaluate(recipe, show_progress=False).models["recovered"].kl > 0


def test_lora_stops_and_goes_on(write_recipe: Callable[..., Path], workplace: Path, monkeypatch: pytest.MonkeyPatch):
    changes = {"student__lora": LORA, "train__save_steps": 2, "train__learning_rate": 0.05}
    whole = load_recipe(write_recipe(output=str(workplace / "whole"), **changes))
    precompute(whole, show_progress=False)
    train(whole)
    stopped = load_recipe(write_recipe(**changes))
    train_and_die(stopped, at_step=3, monkeypatch=monkeypatch)
    checkpoint = workplace / "run/checkpoints/checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert not (checkpoint / "model.safetensors").exists()
    assert train(stopped).trained_steps == 2
    for name, value in load_file(workplace / "whole/student/model.safetensors").items():
        assert torch.equal(load_file(workplace / "run/student/model.safetensors")[name], value)


def test_lora_without_a_target_is_one_line(write_recipe: Callable[..., Path]):
    precompute(load_recipe(write_recipe()), show_progress=False)
    recipe = load_recipe(write_recipe(student__lora={"r": 4, "target_modules": ["nothing"]}))
    for stage in (precompute, train):
        with pytest.raises(RecipeError, match="^student.lora: Target modules .*nothing.* not found"):
            stage(recipe)


def test_an_adapted_output_head_is_not_taken_apart(write_recipe: Callable[..., Path]):
    recipe = load_recipe(write_recipe(student__lora={"r": 4, "target_modules": ["lm_head"]}))
    precompute(recipe, show_progress=False)
    with pytest.warns(UserWarning, match="its output head is a Linear, which Coldstill does not take apart"):
        trainer = trainer_of(recipe)
    found = gradients(trainer)
    assert any(value.abs().max() > 0 for name, value in found.items() if "lm_head" in name)


@pytest.mark.parametrize("kind", ["normalised_mse", "standardised_mse"])
def test_projectors_begin_where_least_squares_puts_them(write_recipe: Callable[..., Path], workplace: Path, kind: str):
    narrow = {"student": {"path": str(workplace / "narrow")}, "mapping": {"strategy": "uniform"}}
    common = {**narrow, "loss__hidden": kind, "train__logging_steps": 1}
    cold = load_recipe(write_recipe(output=str(workplace / "cold"), **common))
    precompute(cold, show_progress=False)
    train(cold)
    train(load_recipe(write_recipe(**common, projector={"init": "least_squares", "init_rows": 20})))
    first = {name: log_of(workplace, name)[0]["loss_hidden"] for name in ("cold", "run")}
    assert first["run"] < 0.9 * first["cold"]


class Squashed(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 5 * torch.tanh(output.logits / 5)
        return output


def test_a_student_with_an_unknown_head_trains_and_is_judged_by_its_own_logits(
    write_recipe: Callable[..., Path], workplace: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = load_recipe(write_recipe(train__logging_steps=1))
    precompute(recipe, show_progress=False)
    load = AutoModelForCausalLM.from_pretrained

    def load_squashed(*args: Any, **kwargs: Any) -> Any:
        model, loaded = load(*args, **kwargs)
        model.__class__ = Squashed
        return model, loaded

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load_squashed)
    with pytest.warns(UserWarning, match="Squashed: output head over last hidden state differs .* computed whole"):
        train(recipe)
    losses = [entry["loss_task"] for entry in log_of(workplace)]
    # Of logits within 5, cross entropy is within these bounds; of those without the cap it is far above.
    assert all(0 < loss < math.log(384) + 10 for loss in losses)
    with pytest.warns(UserWarning, match="computed whole"):
        judged = evaluate(recipe, show_progress=False).models["recovered"]
    assert 0 < judged.loss < math.log(384) + 10


def test_float16_gradients_do_not_vanish(write_recipe: Callable[..., Path]):
    """The gradient of one of a thousand positions is below float16's range before the loss is scaled up."""
    recipe = load_recipe(write_recipe(loss__gamma=0.0))
    precompute(recipe, show_progress=False)
    want = gradients(trainer_of(recipe))
    trainer = trainer_of(recipe)
    batch = next(iter(trainer.get_train_dataloader()))
    scale = 2.0**10
    with torch.autocast("cpu", dtype=torch.float16):
        loss = trainer.model(**batch, num_items_in_batch=100_000)["loss"]
    (loss * scale).backward()
    head = trainer.model.student.lm_head.weight.grad / scale * 100_000 / 92
    cosine = torch.nn.functional.cosine_similarity(head.flatten(), want["student.lm_head.weight"].flatten(), dim=0)
    assert cosine > 0.999
    assert head.norm().item() == pytest.approx(want["student.lm_head.weight"].norm().item(), rel=0.02)


def test_an_optimizer_whose_library_is_missing_is_one_line(
    write_recipe: Callable[..., Path], coldstill: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False)
    coldstill("precompute", write_recipe())
    recipe = write_recipe(train__optim="adamw_8bit")
    for stage in ("precompute", "train"):
        (line,) = coldstill(stage, recipe, expect=2).stderr.splitlines()
        assert line.startswith("coldstill: train: You need to install `bitsandbytes`")
