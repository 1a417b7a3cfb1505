"""Training from the store, from a teacher beside the student, and the definition: one loss, one gradient."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training import trainer_of
from transformers import AutoModelForCausalLM

from coldstill.pipeline.losses.divergences import DIVERGENCES
from coldstill.pipeline.models.counted import counted_of
from coldstill.pipeline.models.labels import counts_of
from coldstill.pipeline.precompute import precompute
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.runtime.errors import RecipeError
from coldstill.pipeline.stage_two.distiller import Distiller
from coldstill.pipeline.stage_two.live_targets import LiveTargets
from coldstill.pipeline.targets.encodings import decode_state

TERMS = {
    "task": {"alpha": 1.0, "beta": 0.0, "gamma": 0.0},
    "logits": {"alpha": 0.0, "beta": 1.0, "gamma": 0.0},
    "hidden": {"alpha": 0.0, "beta": 0.0, "gamma": 1.0},
    "together": {"alpha": 0.4, "beta": 0.5, "gamma": 0.3},
}
EXACT = {
    "logits": {"kind": "topk", "k": 384, "values": "float32", "temperatures": [1, 2]},
    "hidden": {"encoding": "float32"},
}


def offline(recipe: Recipe) -> tuple[Any, dict[str, Any]]:
    """The trainer that stage two would run, and its first batch."""
    trainer = trainer_of(recipe)
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
    next_tokens = batch["labels"][:, 1:]
    counts = next_tokens != -100
    temperature = recipe.loss.temperature
    task = F.cross_entropy(student_logits[:, :-1][counts], next_tokens[counts])
    divergence = dense_divergence(
        recipe, *((logits[:, :-1][counts] / temperature).log_softmax(-1) for logits in (teacher_logits, student_logits))
    )
    hidden = [
        F.mse_loss(
            distiller.projectors[str(s)](states["student", s][:, :-1][counts]), states["teacher", t][:, :-1][counts]
        )
        for s, t in distiller.layer_map.items()
    ]
    weights = recipe.loss
    return (
        weights.alpha * task
        + weights.beta * divergence * temperature**2
        + weights.gamma * (torch.stack(hidden).mean() if hidden else 0.0)
    )


def dense_divergence(recipe: Recipe, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The definition over whole distributions, the mean over positions."""
    loss = recipe.loss
    weight = loss.divergence_weight

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return F.kl_div(log_b, log_a, log_target=True, reduction="batchmean")

    def mixed(share: float) -> Tensor:
        return (share * log_p.exp() + (1 - share) * log_q.exp()).log()

    if loss.divergence == "forward_kl":
        return kl(log_p, log_q)
    if loss.divergence == "reverse_kl":
        return kl(log_q, log_p)
    if loss.divergence == "jensen_shannon":
        return weight * kl(log_p, mixed(weight)) + (1 - weight) * kl(log_q, mixed(weight))
    if loss.divergence == "skewed_kl":
        return kl(log_p, mixed(weight))
    if loss.divergence == "bidirectional":
        return weight * kl(log_p, log_q) + (1 - weight) * kl(log_q, log_p)
    if loss.divergence == "total_variation":
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1).mean()
    entropy = -(log_p.exp() * log_p).sum(-1)
    top_p, ids = log_p.topk(loss.selective_k)
    top_q = log_q.gather(-1, ids)
    terms = (top_p.exp() * (top_p - top_q) - top_p.exp() + top_q.exp()).sum(-1)
    return terms.where(entropy > loss.selective_entropy, 0.0).mean()


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
    stored_gradients = compare_with_live(recipe)
    if term in ("hidden", "together") and student == "narrow":
        assert any(name.startswith("projectors.") for name in stored_gradients)


def compare_with_live(recipe: Recipe) -> dict[str, Tensor]:
    """Loss and every gradient, from the store and from a live teacher, against the definition; gives the gradients."""
    precompute(recipe, show_progress=False)
    trainer, batch = offline(recipe)
    distiller = trainer.model
    want_loss, want = gradients_of(distiller, online_loss(recipe, distiller, batch))
    for loss in (distiller(**batch)["loss"], live_loss(recipe, distiller, batch)):
        got_loss, got = gradients_of(distiller, loss)
        assert torch.allclose(got_loss, want_loss, rtol=1e-5, atol=1e-6)
        assert got.keys() <= want.keys()
        for name, value in want.items():
            atol = 1e-5 * max(value.abs().max().item(), 1e-3)
            assert torch.allclose(got.get(name, torch.zeros_like(value)), value, rtol=1e-5, atol=atol), name
    return got


def live_loss(recipe: Recipe, distiller: Any, batch: dict[str, Any]) -> Tensor:
    """The same student and projectors on the batch without its stored targets, with a teacher beside them."""
    teacher = AutoModelForCausalLM.from_pretrained(recipe.teacher.path, dtype=torch.float32)
    live = Distiller(
        distiller.student, distiller.projectors, layer_map=distiller.layer_map, objective=distiller.objective
    )
    targets = LiveTargets.beside(live, teacher, torch.device("cpu"))
    ordinary = {name: values for name, values in batch.items() if name not in ("logits", "hidden")}
    return live(**ordinary, **targets(ordinary))["loss"]


def gradients_of(distiller: Any, loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    distiller.zero_grad(set_to_none=True)
    loss.backward()
    named = distiller.named_parameters()
    return loss.detach(), {name: value.grad.clone() for name, value in named if value.grad is not None}


# 1.7 is not among the temperatures of the recipe: the final state gives every temperature.
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_each_divergence_from_the_final_state_equals_the_live_teachers_over_every_token(
    write_recipe: Callable[..., Path], divergence: str, temperature: float
):
    weight = {"jensen_shannon": 0.4, "skewed_kl": 0.2, "bidirectional": 0.7}.get(divergence)
    recipe = load_recipe(
        write_recipe(
            targets={"logits": {"kind": "final", "encoding": "float32"}, "hidden": {"blocks": "none"}},
            loss={
                **TERMS["logits"],
                "temperature": temperature,
                "divergence": divergence,
                "selective_k": 5,
                "selective_entropy": 2.0,
                **({} if weight is None else {"divergence_weight": weight}),
            },
        )
    )
    gradients = compare_with_live(recipe)
    assert max(value.abs().max() for value in gradients.values()) > 1e-3, "there is something to compare"


@pytest.mark.parametrize("packing", [True, False])
def test_the_final_state_beside_the_other_terms_equals_the_live_teacher(
    write_recipe: Callable[..., Path], packing: bool
):
    recipe = load_recipe(
        write_recipe(
            targets={"logits": {"kind": "final", "encoding": "float32"}, "hidden": {"encoding": "float32"}},
            data__packing=packing,
            data__sequence_length=24 if packing else 60,
            loss={**TERMS["together"], "temperature": 2.0, "hidden": "mse"},
        )
    )
    compare_with_live(recipe)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("values", ["float32", "delta"])
@pytest.mark.parametrize("k", [16, 384])
def test_student_equal_to_teacher_is_a_fixed_point(
    write_recipe: Callable[..., Path], workplace: Path, temperature: float, values: str, k: int
):
    recipe = load_recipe(
        write_recipe(
            student={"path": str(workplace / "teacher")},
            mapping={"strategy": "uniform"},
            targets={
                "logits": {"kind": "topk", "k": k, "values": values, "temperatures": [1, 2]},
                "hidden": {"encoding": "int8"},
            },
            loss={"alpha": 0.0, "beta": 1.0, "gamma": 1e-9, "temperature": temperature, "hidden": "normalised_mse"},
        )
    )
    precompute(recipe, show_progress=False)
    trainer, batch = offline(recipe)
    terms = trainer.model(**batch)
    terms["loss"].backward()
    largest = max(value.grad.abs().max() for value in trainer.model.parameters() if value.grad is not None)
    exact = values == "float32"
    assert abs(terms["loss_logits"].item()) < (1e-6 if exact else 1e-4)
    assert largest < (2e-5 if exact else 2e-2)
    # Half a step of 1/127 of each position's largest channel, squared, over the position's variance.
    assert terms["loss_hidden"] < 1e-3


def test_a_temperature_that_is_not_stored_is_refused_with_the_stored_ones(write_recipe: Callable[..., Path]):
    with pytest.raises(
        RecipeError, match=r"loss\.temperature 3 is not stored; targets\.logits\.temperatures has 1, 2: use"
    ):
        load_recipe(write_recipe(loss__temperature=3.0))


def test_a_larger_k_on_disk_serves_a_smaller_one(write_recipe: Callable[..., Path]):
    precompute(load_recipe(write_recipe(targets__logits__k=64)), show_progress=False)
    recipe = load_recipe(write_recipe(targets__logits__k=16))
    assert precompute(recipe, show_progress=False).computed_tokens == 0
    trainer, batch = offline(recipe)
    assert batch["logits"]["topk"]["ids_0"].shape[-1] == 64
    assert torch.isfinite(trainer.model(**batch)["loss"])


@dataclass(frozen=True)
class FixedPoint:
    """A kind of target, and how large its loss and its largest gradient may be where student equals teacher."""

    name: str
    logits: dict[str, Any]
    loss: float
    gradient: float


# Twice what was measured. Of `coded`, a step of 0.03 over 32 coefficients makes a KL of 32 * 0.03^2 / 24 = 0.0012 nats.
FIXED_POINTS = [
    FixedPoint("sampled", {"kind": "topk_sampled", "k": 16, "samples": 8, "temperatures": [1, 2]}, 3e-5, 6e-4),
    FixedPoint("coded", {"kind": "final"}, 2.4e-3, 2e-3),
    FixedPoint("int8", {"kind": "final", "encoding": "int8"}, 5e-6, 1e-4),
    FixedPoint("float16", {"kind": "final", "encoding": "float16"}, 1e-7, 4e-6),
    FixedPoint("float32", {"kind": "final", "encoding": "float32"}, 1e-9, 1e-8),
]


@pytest.mark.parametrize(("divergence", "temperature"), [("forward_kl", 1.0), ("jensen_shannon", 2.0)])
@pytest.mark.parametrize("case", FIXED_POINTS, ids=lambda case: case.name)
def test_student_equal_to_teacher_is_a_fixed_point_of_every_kind(
    write_recipe: Callable[..., Path], workplace: Path, case: FixedPoint, divergence: str, temperature: float
):
    recipe = load_recipe(
        write_recipe(
            student={"path": str(workplace / "teacher")},
            targets={"logits": case.logits, "hidden": {"blocks": "none"}},
            loss={**TERMS["logits"], "temperature": temperature, "divergence": divergence},
        )
    )
    precompute(recipe, show_progress=False)
    trainer, batch = offline(recipe)
    terms = trainer.model(**batch)
    terms["loss"].backward()
    largest = max(value.grad.abs().max() for value in trainer.model.parameters() if value.grad is not None)
    # The float16 rounding of a state is a KL of about 1e-9, that of the normalisers' logarithms 1e-7.
    assert -1e-7 <= terms["loss_logits"] <= case.loss
    assert largest <= case.gradient


@pytest.mark.parametrize("encoding", ["float32", "int8", "coded"])
def test_of_positions_stored_at_random_only_those_count_and_their_sum_stands_for_all(
    write_recipe: Callable[..., Path], encoding: str
):
    fraction = 0.5
    common: dict[str, Any] = {
        "data__packing": False,
        "data__sequence_length": 60,
        "loss": {**TERMS["hidden"], "hidden": "mse"},
    }
    whole, sampled = (
        load_recipe(
            write_recipe(**common, targets={"logits": {"kind": "none"}, "hidden": {"encoding": encoding, **more}})
        )
        for more in ({}, {"token_fraction": fraction})
    )
    precompute(whole, sampled, show_progress=False)
    (trainer, batch), (other, sampled_batch) = offline(whole), offline(sampled)
    assert torch.equal(batch["input_ids"], sampled_batch["input_ids"])
    counts, forms = counts_of(batch), trainer.model.forms
    states: dict[int, Tensor] = {}
    for index, block in enumerate(other.model.student.model.layers):
        block.register_forward_hook(lambda _m, _a, out, index=index: states.update({index: out}))
    got = other.model(**sampled_batch)["loss_hidden"]
    losses, chosen = [], []
    for student_block, teacher_block in other.model.layer_map.items():
        arrays = sampled_batch["hidden"][str(teacher_block)]
        stored = arrays["stored"].bool() & counts
        assert not any(
            values[~arrays["stored"].bool()].any()
            for name, values in arrays.items()
            if name not in ("centre", "spread")
        )
        code = forms.hidden.codes.get(teacher_block)
        teacher = decode_state(batch["hidden"][str(teacher_block)], form=forms.hidden.form, code=code)
        error = (other.model.projectors[str(student_block)](states[student_block]) - teacher).square().mean(-1)
        losses.append(error[stored].sum() / (fraction * counts.sum()))
        chosen.append(stored)
    assert torch.allclose(got, torch.stack(losses).mean(), rtol=1e-5)
    assert all(torch.equal(each, chosen[0]) for each in chosen), "the same positions of every block"
    assert 0.3 < chosen[0].sum() / counts.sum() < 0.7


def test_over_many_rows_the_mean_over_random_positions_is_near_that_over_all(write_recipe: Callable[..., Path]):
    loss = {**TERMS["hidden"], "hidden": "normalised_mse"}
    recipes = [
        load_recipe(
            write_recipe(loss=loss, targets={"logits": {"kind": "none"}, "hidden": {"encoding": "float32", **more}})
        )
        for more in ({}, {"token_fraction": 0.25})
    ]
    precompute(*recipes, show_progress=False)
    means = []
    for recipe in recipes:
        trainer, _ = offline(recipe)
        with torch.no_grad():
            losses = [trainer.model(**batch)["loss_hidden"] for batch in trainer.get_train_dataloader()]
        means.append(torch.stack(losses).mean().item())
    # Of 460 positions a quarter: their number has a standard deviation of 8%, and a wrong divisor misses by 4.
    assert means[1] == pytest.approx(means[0], rel=0.25)


@pytest.mark.parametrize(("encoding", "corrects"), [("coded", True), ("int8", False), ("float32", False)])
def test_coded_final_states_are_read_with_the_correction_of_their_rounding(
    write_recipe: Callable[..., Path], encoding: str, corrects: bool
):
    recipe = load_recipe(
        write_recipe(
            targets={"logits": {"kind": "final", "encoding": encoding}, "hidden": {"blocks": "none"}},
            loss={**TERMS["logits"], "temperature": 2.0},
        )
    )
    precompute(recipe, show_progress=False)
    trainer, batch = offline(recipe)
    target = trainer.model.forms.logits.read(batch["logits"], counted_of(batch), 2.0)
    assert (target.correction_V is not None) == corrects
    if corrects:
        head = trainer.model.forms.logits.head
        excess = 0.03**2 * (head.weight_VD @ trainer.model.forms.logits.code.synthesis_DD.T).square().sum(-1) / 12
        # Calibrated on 460 positions, all coefficients are many steps wide: a twelfth of a squared step in each.
        assert torch.allclose(target.correction_V, -excess / 2, rtol=0.05)
