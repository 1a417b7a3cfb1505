"""What a run tells while it trains: every term of the loss on train and eval rows, to the log and to integrations."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from training import trainer_of
from transformers import AutoModelForCausalLM

from coldstill.pipeline.precompute import precompute
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.train import train

EXACT = {
    "targets__logits": {"kind": "final", "encoding": "float32"},
    "targets__hidden": {"encoding": "float32"},
}
TERMS = ("task", "logits", "hidden", "dynamics")
# Documents of several lengths in batches of 4 and 1: a batch counts once for each of its rows.
UNEVEN = {
    "data__packing": False,
    "data__sequence_length": 60,
    "data__eval__max_rows": 5,
    "train__per_device_eval_batch_size": 4,
}
LOSS = {"alpha": 0.4, "beta": 0.5, "gamma": 0.3, "delta": 0.2, "temperature": 2.0, "hidden": "mse", "dynamics": "mse"}


def eval_terms(workplace: Path) -> list[dict[str, float]]:
    log = json.loads((workplace / "run/train.json").read_text())["log"]
    return [entry for entry in log if "eval_loss" in entry]


def block_outputs(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Give logits [B, T, V] and the output of each block, by hooks."""
    states: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _a, out: states.append(out)) for block in model.model.layers]
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
    for hook in hooks:
        hook.remove()
    return logits, states


def test_eval_terms_are_those_of_the_live_models_and_make_up_the_eval_loss(
    write_recipe: Callable[..., Path], workplace: Path
):
    recipe = load_recipe(write_recipe(**EXACT, **UNEVEN, loss=LOSS, train__eval_strategy="steps", train__eval_steps=4))
    precompute(recipe, show_progress=False)
    train(recipe)
    (got,) = eval_terms(workplace)
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (recipe.teacher.path, workplace / "run/student")
    )
    trainer = trainer_of(recipe)
    sums = dict.fromkeys(TERMS, 0.0)
    for batch in trainer.get_eval_dataloader():
        next_tokens = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        counts = next_tokens != -100
        (p, teacher_blocks), (q, student_blocks) = block_outputs(teacher, batch), block_outputs(student, batch)
        log_p, log_q = ((logits[counts] / 2.0).log_softmax(-1) for logits in (p, q))
        pairs = [(student_blocks[s][counts], teacher_blocks[t][counts]) for s, t in trainer.layer_map.items()]
        changes = [(own - last[0], its - last[1]) for (own, its), last in zip(pairs[1:], pairs, strict=False)]
        terms = {
            "task": F.cross_entropy(q[counts], next_tokens[counts]),
            # The square of the temperature is in the term, as it is in the loss.
            "logits": F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * 2.0**2,
            "hidden": torch.stack([F.mse_loss(*pair) for pair in pairs]).mean(),
            "dynamics": torch.stack([F.mse_loss(*pair) for pair in changes]).mean(),
        }
        for name, value in terms.items():
            sums[name] += float(value) * len(next_tokens)
    for name in TERMS:
        assert got[f"eval_loss_{name}"] == pytest.approx(sums[name] / 5, rel=1e-4), name
    weights = zip((0.4, 0.5, 0.3, 0.2), TERMS, strict=True)
    assert got["eval_loss"] == pytest.approx(sum(weight * got[f"eval_loss_{name}"] for weight, name in weights))


def test_a_batch_without_a_number_is_left_out_of_the_terms_as_it_is_of_the_eval_loss(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    recipe = load_recipe(write_recipe(**UNEVEN))
    precompute(recipe, show_progress=False)
    trainer = trainer_of(recipe)
    compute, seen = trainer.compute_loss, []

    def broken_once(model: Any, inputs: Any, **options: Any) -> Any:
        loss, terms = compute(model, inputs, **options)
        seen.append(loss)
        return (
            (loss * math.nan, {name: value * math.nan for name, value in terms.items()})
            if len(seen) == 1
            else (
                loss,
                terms,
            )
        )

    monkeypatch.setattr(trainer, "compute_loss", broken_once)
    got = trainer.evaluate()
    assert len(seen) == 2
    parts = 0.5 * got["eval_loss_task"] + 0.5 * got["eval_loss_logits"] + 0.1 * got["eval_loss_hidden"]
    assert got["eval_loss"] == pytest.approx(parts) == pytest.approx(seen[1].item())


def test_tensorboard_gets_every_term_of_train_and_eval_and_every_scheduled_value(
    write_recipe: Callable[..., Path], workplace: Path
):
    recipe = load_recipe(
        write_recipe(
            **EXACT,
            loss={**LOSS, "schedule": {"gamma": {"end": 0.7}, "temperature": {"end": 4.0}}},
            train__report_to="tensorboard",
            train__eval_strategy="steps",
            train__eval_steps=2,
        )
    )
    precompute(recipe, show_progress=False)
    train(recipe)
    (folder,) = (workplace / "run/checkpoints/runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    names = [f"loss_{name}" for name in TERMS]
    expected = [f"train/{name}" for name in ("loss", *names, "gamma", "temperature", "learning_rate", "grad_norm")]
    expected += [f"eval/{name}" for name in ("loss", *names)]
    assert set(expected) <= set(events.Tags()["scalars"])
    log = json.loads((workplace / "run/train.json").read_text())["log"]
    for tag in expected:
        split, name = tag.split("/")
        key = name if split == "train" else f"eval_{name}"
        written = [(event.step, event.value) for event in events.Scalars(tag)]
        logged = [(entry["step"], entry[key]) for entry in log if key in entry]
        assert [step for step, _ in written] == [2, 4]
        assert written == [(step, pytest.approx(value)) for step, value in logged], tag


@pytest.mark.parametrize(
    ("integration", "command"), [("tensorboard", "coldstill[tensorboard]"), ("wandb", "wandb"), ("trackio", "trackio")]
)
def test_an_integration_that_is_not_installed_is_one_line_with_its_installation(
    coldstill: Callable[..., Any],
    write_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    integration: str,
    command: str,
):
    for name in (integration, f"{integration}X"):
        monkeypatch.setitem(sys.modules, name, None)
    precompute(load_recipe(write_recipe()), show_progress=False)
    recipe = write_recipe(train__report_to=integration)
    for stage in ("precompute", "train"):
        (line,) = coldstill(stage, recipe, expect=2).stderr.splitlines()
        assert integration in line
        assert "pip install" in line
        assert command in line
