"""What prompts weigh, from a recipe to the loss: like the text, not at all, and half, as the definition has it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training import trainer_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from coldstill.cache.spans import Span
from coldstill.pipeline.evaluate import evaluate
from coldstill.pipeline.outputs.run_index import find_run_rows
from coldstill.pipeline.precompute import precompute
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.stage_two.completing import complete_batch
from coldstill.pipeline.train import train

EXACT = {"logits": {"kind": "final", "encoding": "float32"}, "hidden": {"encoding": "float32"}}


@pytest.fixture
def recipe_of(workplace: Path, corpus: list[str], write_recipe: Callable[..., Path]) -> Callable[..., Recipe]:
    """A recipe over questions and answers, every third one without a question; or over both as one text."""
    for split, lines in (("train", corpus[:12]), ("eval", corpus[12:16])):
        rows = []
        for index, line in enumerate(lines):
            words = line.split()
            question = " ".join(words[: 3 * (index % 3 > 0)])
            answer = (" " if question else "") + " ".join(words[3:9])
            rows.append({"question": question, "answer": answer, "both": question + answer})
        (workplace / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def written(name: str, *, asks: bool = True, **changes: Any) -> Recipe:
        columns = {"text_column": "answer", "prompt_column": "question"} if asks else {"text_column": "both"}
        sources = {
            f"data__{split}": {"path": "json", "data_files": str(workplace / f"{split}.jsonl"), **columns}
            for split in ("train", "eval")
        }
        given = {"data__packing": False, **sources, "targets": EXACT, "output": str(workplace / name), **changes}
        return load_recipe(write_recipe(**given))

    return written


def student_of(recipe: Recipe) -> bytes:
    return (Path(recipe.output) / "student" / "model.safetensors").read_bytes()


def test_a_prompt_that_weighs_all_trains_the_student_that_no_prompt_does_to_the_bit(recipe_of):
    recipes = [recipe_of("whole", asks=False), recipe_of("all", data__prompt_weight=1), recipe_of("none")]
    precompute(*recipes, show_progress=False)
    for recipe in recipes:
        train(recipe)
    whole, weighs_all, weighs_nothing = map(student_of, recipes)
    assert weighs_all == whole
    assert weighs_nothing != whole


def test_another_weight_of_prompts_is_another_selection_of_the_same_rows_and_costs_no_teacher(recipe_of):
    precompute(recipe_of("none"), show_progress=False)
    recipe = recipe_of("half", data__prompt_weight=0.5)
    assert precompute(recipe, show_progress=False).computed_tokens == 0
    selections = [find_run_rows(each).selections["train"] for each in (recipe_of("none"), recipe)]
    assert selections[0].name != selections[1].name
    none, half = ([span for spans in selection.spans for span in spans] for selection in selections)
    assert half == [Span(0, stop, 0.5) for _, stop, _ in none]
    assert len(none) == 8


def test_a_prompt_that_weighs_half_has_the_gradient_of_the_definition(recipe_of, workplace: Path):
    narrow = {"student": {"path": str(workplace / "narrow")}, "mapping": {"strategy": "uniform"}}
    recipe = recipe_of("half", data__prompt_weight=0.5, train__gradient_accumulation_steps=2, **narrow)
    precompute(recipe, show_progress=False)
    trainer = trainer_of(recipe)
    batches, num_items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, torch.device("cpu"))
    weights = [weights_by_hand(workplace, batch) for batch in batches]
    assert {0.0, 0.5, 1.0} == {value for each in weights for value in each.unique().tolist()}
    total = sum(each.sum() for each in weights)
    assert float(num_items) == pytest.approx(float(total))
    trainer.model.train()
    for batch in batches:
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=num_items).backward()
    parameters = dict(trainer.model.named_parameters())
    got = {name: value.grad for name, value in parameters.items() if value.grad is not None}
    trainer.model.zero_grad()
    sum(definition(recipe, trainer.model, batch, each) for batch, each in zip(batches, weights, strict=True)).div(
        total
    ).backward()
    for name, gradient in got.items():
        want = parameters[name].grad
        assert (gradient - want).abs().max() <= 1e-4 * want.abs().max(), name
    assert len(got) > 20


def weights_by_hand(workplace: Path, batch: dict[str, Tensor]) -> Tensor:
    """Weigh the token that follows each position: half in a question, 1 in an answer, 0 behind a row."""
    tokenizer = AutoTokenizer.from_pretrained(workplace / "teacher")
    num_asked = {}
    for line in map(json.loads, (workplace / "train.jsonl").read_text().splitlines()):
        question, answer = (tokenizer(line[part])["input_ids"] for part in ("question", "answer"))
        num_asked[(*question, *answer, tokenizer.eos_token_id)[:24]] = len(question)
    weights = torch.zeros(batch["input_ids"].shape)
    for index, ids in enumerate(batch["input_ids"].tolist()):
        (row,) = (row for row in num_asked if row == tuple(ids[: len(row)]))
        weights[index, : len(row)] = 1.0
        weights[index, : num_asked[row]] = 0.5
    return weights[:, 1:]


def definition(recipe: Recipe, distiller: Any, batch: dict[str, Any], weights: Tensor) -> Tensor:
    """The sum over positions of all terms, each position times its weight, with the teacher beside the student."""
    teacher = AutoModelForCausalLM.from_pretrained(recipe.teacher.path, dtype=torch.float32).eval()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch.get("attention_mask")}
    states: dict[tuple[str, int], Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda _m, _a, out, key=(name, index): states.update({key: out}))
        for name, model in (("teacher", teacher), ("student", distiller.student))
        for index, block in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        of_teacher = teacher(**inputs).logits[:, :-1]
    logits = distiller.student(**inputs).logits[:, :-1]
    for hook in hooks:
        hook.remove()
    temperature = recipe.loss.temperature
    task = F.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    log_p, log_q = ((each / temperature).log_softmax(-1) for each in (of_teacher, logits))
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1) * temperature**2
    pairs = [
        (distiller.projectors[str(s)](states["student", s]) - states["teacher", t]).square().mean(-1)[:, :-1]
        for s, t in distiller.layer_map.items()
    ]
    loss = recipe.loss
    each = loss.alpha * task + loss.beta * divergence + loss.gamma * torch.stack(pairs).mean(0)
    return (each * weights).sum()


def test_the_eval_loss_is_weighted_as_the_train_loss_is(recipe_of):
    recipe = recipe_of("half", data__prompt_weight=0.5, loss={"alpha": 1.0, "beta": 0.0, "gamma": 0.0})
    precompute(recipe, show_progress=False)
    trainer = trainer_of(recipe)
    (batch,) = [complete_batch(batch) for batch in trainer.get_eval_dataloader()]
    weights = batch["weights"][:, 1:]
    with torch.no_grad():
        logits = trainer.model.student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    expected = float((losses * weights).sum() / weights.sum())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert float((losses * (weights > 0)).sum() / (weights > 0).sum()) != pytest.approx(expected, rel=1e-3)


def test_an_evaluation_counts_each_position_that_weighs_something_once(recipe_of):
    recipes = {weight: recipe_of(f"run-{weight}", data__prompt_weight=weight) for weight in (0, 0.5, 1)}
    precompute(*recipes.values(), show_progress=False)
    found = {weight: evaluate(recipe, show_progress=False) for weight, recipe in recipes.items()}
    assert found[0.5].models == found[1].models != found[0].models
    lengths = {weight: find_run_rows(recipe).selections["eval"].lengths for weight, recipe in recipes.items()}
    assert found[1].num_tokens == found[0.5].num_tokens == int(np.sum(np.array(lengths[1]) - 1))
    prompts = [spans[0].stop - 1 if spans else 0 for spans in find_run_rows(recipes[0]).selections["eval"].spans]
    assert found[0].num_tokens == found[1].num_tokens - sum(prompts)
