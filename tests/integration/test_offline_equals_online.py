"""Training from the store against a live teacher: same batch, same loss, same gradient of every parameter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from cache.errors import RecipeError
from pipeline.config import Recipe
from pipeline.precompute import precompute
from pipeline.recipe_file import load_recipe
from pipeline.run_index import find_run_rows
from pipeline.student_folders import find_student
from pipeline.train import _load_student, _make_trainer, _plan, train

TERMS = {
    "task": {"alpha": 1.0, "beta": 0.0, "gamma": 0.0},
    "logits": {"alpha": 0.0, "beta": 1.0, "gamma": 0.0},
    "hidden": {"alpha": 0.0, "beta": 0.0, "gamma": 1.0},
    "together": {"alpha": 0.4, "beta": 0.5, "gamma": 0.3},
}
EXACT = {"logits": {"k": 384, "values": "float32", "temperatures": [1, 2]}, "hidden": {"encoding": "float32"}}


def offline(recipe: Recipe) -> tuple[Any, dict[str, Any]]:
    """The trainer that stage two would run, and its first batch."""
    run, folder = find_run_rows(recipe), find_student(recipe)
    student = _load_student(recipe, run, folder)
    layer_map, collator = _plan(recipe, run, student.config)
    trainer = _make_trainer(recipe, run, student, layer_map, collator, folder)
    return trainer, next(iter(trainer.get_train_dataloader()))


def online_loss(recipe: Recipe, distiller: Any, batch: dict[str, Any]) -> Tensor:
    """The definition, with the teacher beside the student: dense logits, all hidden states."""
    teacher = AutoModelForCausalLM.from_pretrained(recipe.teacher.path, dtype=torch.float32).eval()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch.get("attention_mask")}
    states: dict[tuple[str, int], Tensor] = {}
    for name, model in (("teacher", teacher), ("student", distiller.student)):
        for index, block in enumerate(model.model.layers):
            block.register_forward_hook(lambda _m, _a, out, key=(name, index): states.update({key: out}))
    with torch.no_grad():
        teacher_logits = teacher(**inputs).logits
    student_logits = distiller.student(**inputs).logits
    counts = batch["labels"] != -100
    temperature = recipe.loss.temperature
    task = F.cross_entropy(student_logits[counts], batch["labels"][counts])
    divergence = F.kl_div(
        (student_logits[counts] / temperature).log_softmax(-1),
        (teacher_logits[counts] / temperature).softmax(-1),
        reduction="batchmean",
    )
    hidden = [
        F.mse_loss(distiller.projectors[str(s)](states["student", s][counts]), states["teacher", t][counts])
        for s, t in distiller.layer_map.items()
    ]
    weights = recipe.loss
    return (
        weights.alpha * task
        + weights.beta * divergence * temperature**2
        + weights.gamma * (torch.stack(hidden).mean() if hidden else 0.0)
    )


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("student", ["pruned", "narrow"])
@pytest.mark.parametrize("packing", [True, False])
def test_loss_and_every_gradient_equal_the_live_teachers(
    write_recipe: Callable[..., Path], workplace: Path, term: str, student: str, packing: bool
):
    changes: dict[str, Any] = {} if student == "pruned" else {"student": {"path": str(workplace / "narrow")}}
    recipe = load_recipe(
        write_recipe(
            targets=EXACT,
            mapping={"strategy": "uniform"},
            data__packing=packing,
            data__sequence_length=24 if packing else 60,
            loss={**TERMS[term], "temperature": 2.0, "hidden": "mse"},
            **changes,
        )
    )
    precompute(recipe, show_progress=False)
    trainer, batch = offline(recipe)
    distiller = trainer.model
    stored = distiller(**batch)["loss"]
    stored.backward()
    stored_gradients = {
        name: value.grad.clone() for name, value in distiller.named_parameters() if value.grad is not None
    }
    distiller.zero_grad(set_to_none=True)
    live = online_loss(recipe, distiller, batch)
    live.backward()
    assert torch.allclose(stored, live, rtol=1e-5, atol=1e-6)
    for name, value in distiller.named_parameters():
        want = torch.zeros_like(value) if value.grad is None else value.grad
        got = stored_gradients.get(name, torch.zeros_like(value))
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5 * max(want.abs().max().item(), 1e-3)), name
    if term in ("hidden", "together") and student == "narrow":
        assert any(name.startswith("projectors.") for name in stored_gradients)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("values", ["float32", "float16"])
@pytest.mark.parametrize("k", [16, 384])
def test_student_equal_to_teacher_is_a_fixed_point(
    write_recipe: Callable[..., Path], workplace: Path, temperature: float, values: str, k: int
):
    recipe = load_recipe(
        write_recipe(
            student={"path": str(workplace / "teacher")},
            mapping={"strategy": "uniform"},
            targets={"logits": {"k": k, "values": values, "temperatures": [1, 2]}, "hidden": {"encoding": "int8"}},
            loss={"alpha": 0.0, "beta": 1.0, "gamma": 1e-9, "temperature": temperature, "hidden": "normalised_mse"},
        )
    )
    precompute(recipe, show_progress=False)
    trainer, batch = offline(recipe)
    terms = trainer.model(**batch)
    terms["loss_logits"].backward()
    largest = max(value.grad.abs().max() for value in trainer.model.parameters() if value.grad is not None)
    exact = values == "float32"
    assert abs(terms["loss_logits"].item()) < (1e-6 if exact else 1e-4)
    assert largest < (2e-5 if exact else 2e-2)
    # Half a step of 1/127 of each position's largest channel, squared, over the position's variance.
    assert terms["loss_hidden"] < 1e-3


def test_a_temperature_that_is_not_stored_is_refused_with_the_stored_ones(write_recipe: Callable[..., Path]):
    recipe = load_recipe(write_recipe())
    precompute(recipe, show_progress=False)
    recipe = load_recipe(write_recipe(loss__temperature=3.0))
    with pytest.raises(
        RecipeError, match=r"loss\.temperature 3 is not stored; targets\.logits\.temperatures has 1, 2: use"
    ):
        train(recipe)


def test_a_larger_k_on_disk_serves_a_smaller_one(write_recipe: Callable[..., Path]):
    precompute(load_recipe(write_recipe(targets__logits__k=64)), show_progress=False)
    recipe = load_recipe(write_recipe(targets__logits__k=16))
    assert precompute(recipe, show_progress=False).computed_tokens == 0
    trainer, batch = offline(recipe)
    assert batch["topk"]["ids"].shape[-1] == 64
    assert torch.isfinite(trainer.model(**batch)["loss"])
