"""Terms of the loss whose gradients are measured: shares in the log, and weights that keep them in proportion."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from live_pair import LAYER_MAP, arguments, distiller_of, rows
from training import gradients, without_times

from coldstill.pipeline.losses.objective import Objective
from coldstill.pipeline.models.projectors import create_projectors
from coldstill.pipeline.recipe.loss import LossConfig
from coldstill.pipeline.runtime.errors import RecipeError
from coldstill.pipeline.stage_two.distillation_trainer import UniversalDistillationTrainer
from coldstill.pipeline.stage_two.distiller import Distiller
from coldstill.pipeline.stage_two.term_norms import first_rows, term_norms

WEIGHTS = {"alpha": 0.5, "beta": 0.2, "gamma": 0.2, "delta": 0.1}
NAMES = {"alpha": "loss_task", "beta": "loss_logits", "gamma": "loss_hidden", "delta": "loss_dynamics"}
SHARES = {"alpha": "share_task", "beta": "share_logits", "gamma": "share_hidden", "delta": "share_dynamics"}
ONE_ROW = rows(1) * 8


def trainer_of(
    folder: Path, student: Any, teacher: Any, *, section: dict[str, Any], data: Any = ONE_ROW, **changes: Any
) -> UniversalDistillationTrainer:
    given = {"learning_rate": 1e-3, "max_steps": 1, "save_strategy": "no", **changes}
    distiller = distiller_of(copy.deepcopy(student), **section)
    for parameter in distiller.projectors.parameters():
        # Fresh ones are near zero, and with them the gradient of what they project.
        parameter.data.mul_(50.0)
    return UniversalDistillationTrainer(
        distiller,
        args=arguments(folder, **given),
        teacher_model=teacher,
        train_dataset=data,
    )


def norms_by_hand(folder: Path, student: Any, teacher: Any) -> dict[str, float]:
    """The norm of each term's gradient in the student's weights, by its weight's name, from runs of that term alone."""
    norms = {}
    for weight in WEIGHTS:
        alone = {**dict.fromkeys(WEIGHTS, 0.0), weight: 1.0}
        found = gradients(trainer_of(folder, student, teacher, section=alone))
        squares = [value.square().sum() for name, value in found.items() if name.startswith("student.")]
        norms[weight] = math.sqrt(sum(squares))
    return norms


def test_balanced_weights_bring_the_gradients_into_their_proportion_and_the_heaviest_over_vocabulary_stays(
    tmp_path: Path, student: Any, teacher: Any
):
    norms = norms_by_hand(tmp_path, student, teacher)
    assert max(norms.values()) > 5 * min(norms.values()), "nothing is in proportion by itself"
    trainer = trainer_of(tmp_path, student, teacher, section={**WEIGHTS, "balance": "gradient"})
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["alpha"] == WEIGHTS["alpha"]
    balanced = {weight: first[weight] * norm for weight, norm in norms.items()}
    for weight, value in balanced.items():
        assert value / balanced["alpha"] == pytest.approx(WEIGHTS[weight] / WEIGHTS["alpha"], rel=1e-3)
        assert first[SHARES[weight]] == pytest.approx(WEIGHTS[weight], rel=1e-3)
    assert first["loss"] == pytest.approx(sum(first[weight] * first[name] for weight, name in NAMES.items()), rel=1e-5)


def test_without_balance_the_first_log_has_each_terms_share_and_the_weights_stay(
    tmp_path: Path, student: Any, teacher: Any
):
    norms = norms_by_hand(tmp_path, student, teacher)
    trainer = trainer_of(tmp_path, student, teacher, section=WEIGHTS, max_steps=3)
    trainer.train()
    first, *later = trainer.state.log_history[:3]
    total = sum(WEIGHTS[weight] * norm for weight, norm in norms.items())
    for weight, norm in norms.items():
        assert first[SHARES[weight]] == pytest.approx(WEIGHTS[weight] * norm / total, rel=1e-3)
    assert not any(key.startswith("share_") or key in WEIGHTS for entry in later for key in entry)


def test_one_term_has_no_share(tmp_path: Path, student: Any, teacher: Any):
    only = {**dict.fromkeys(WEIGHTS, 0.0), "beta": 1.0, "balance": "gradient"}
    trainer = trainer_of(tmp_path, student, teacher, section=only)
    trainer.train()
    assert not any(key.startswith("share_") or key in WEIGHTS for key in trainer.state.log_history[0])


@pytest.mark.parametrize(
    ("accumulated", "size"), [pytest.param(1, 8, id="one batch"), pytest.param(4, 2, id="four batches")]
)
def test_accumulated_batches_have_the_factors_of_one(
    tmp_path: Path, student: Any, teacher: Any, accumulated: int, size: int
):
    want = trainer_of(tmp_path, student, teacher, section={**WEIGHTS, "balance": "gradient"})
    want.train()
    batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
    got = trainer_of(tmp_path, student, teacher, section={**WEIGHTS, "balance": "gradient"}, **batches)
    got.train()
    for weight, name in NAMES.items():
        assert got.state.log_history[0][weight] == pytest.approx(want.state.log_history[0][weight], rel=1e-5)
        assert got.state.log_history[0][name] == pytest.approx(want.state.log_history[0][name], rel=1e-5)


def test_a_weight_that_moves_is_multiplied_by_its_factor_and_measured_while_it_is_zero(
    tmp_path: Path, student: Any, teacher: Any
):
    schedule = {"gamma": {"end": 0.6}}
    section = {**WEIGHTS, "gamma": 0.0, "balance": "gradient", "schedule": schedule}
    trainer = trainer_of(tmp_path, student, teacher, section=section, max_steps=4)
    trainer.train()
    logged = [entry["gamma"] for entry in trainer.state.log_history[:4]]
    assert logged[0] == 0.0
    assert [value / logged[1] for value in logged[1:]] == pytest.approx([1.0, 2.0, 3.0])
    norms = norms_by_hand(tmp_path, student, teacher)
    assert logged[3] == pytest.approx(0.6 * norms["alpha"] / norms["gamma"], rel=1e-3)


def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes_and_the_same_log(tmp_path: Path, student: Any, teacher: Any):
    section = {**WEIGHTS, "hidden": "standardised_mse", "balance": "gradient"}
    options = {
        "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2, "per_device_train_batch_size": 4
    }  # fmt: skip
    whole = trainer_of(tmp_path, student, teacher, section=section, data=rows(), **options)
    whole.train()
    again = trainer_of(tmp_path, student, teacher, section=section, data=rows(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    logs = [without_times(trainer.state.log_history) for trainer in (whole, again)]
    assert logs[0] == logs[1]
    # At step 4 all was measured anew: the factors before count in it.
    assert "share_hidden" in logs[0][2]
    assert len({entry["gamma"] for entry in logs[0][:3]}) == 2


def test_measuring_leaves_no_trace_in_what_is_trained(build_model: Any, teacher: Any, tmp_path: Path):
    student = build_model(num_hidden_layers=2, hidden_size=16, num_attention_heads=2, attention_dropout=0.3, seed=1)
    trainer = trainer_of(tmp_path, student, teacher, section=WEIGHTS)
    distiller = trainer.model
    distiller.train()
    batch = trainer.with_all_it_takes(next(iter(trainer.get_train_dataloader())))
    before, now = torch.get_rng_state(), distiller.now
    norms = term_norms(distiller, batch)
    assert norms.shape == (4,)
    assert (norms > 0).all()
    assert torch.equal(torch.get_rng_state(), before)
    assert distiller.now is now
    assert all(parameter.grad is None for parameter in distiller.parameters())


@pytest.mark.parametrize("kwargs", [{}, {"selective": True}])
def test_checkpointed_activations_have_the_same_norms(tmp_path: Path, student: Any, teacher: Any, kwargs: Any):
    trainer = trainer_of(tmp_path, student, teacher, section=WEIGHTS)
    trainer.model.train()
    batch = trainer.with_all_it_takes(first_rows(next(iter(trainer.get_train_dataloader())), 2))
    assert batch["input_ids"].shape[0] == 2
    want = term_norms(trainer.model, batch)
    trainer.model.activation_checkpointing_enable(kwargs)
    torch.testing.assert_close(term_norms(trainer.model, batch), want, rtol=1e-4, atol=0)


# Dynamo looks at what it compiles for.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_blocks_have_the_same_norms_and_are_not_compiled_for_them(tmp_path: Path, student: Any, teacher: Any):
    trainer = trainer_of(tmp_path, student, teacher, section=WEIGHTS)
    trainer.model.train()
    batch = trainer.with_all_it_takes(next(iter(trainer.get_train_dataloader())))
    want = term_norms(trainer.model, batch)
    compiled = []

    def backend(graph: Any, _inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    for block in trainer.model.student.model.layers:
        block.forward = torch.compile(block.forward, backend=backend)
    torch.testing.assert_close(term_norms(trainer.model, batch), want, rtol=1e-4, atol=0)
    assert not compiled
    trainer.train()
    assert compiled
    assert "share_hidden" in trainer.state.log_history[0]


def test_bfloat16_has_about_the_same_factors(tmp_path: Path, student: Any, teacher: Any):
    logs = []
    for changes in ({}, {"bf16": True}):
        trainer = trainer_of(tmp_path, student, teacher, section={**WEIGHTS, "balance": "gradient"}, **changes)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    for weight in WEIGHTS:
        assert logs[1][weight] == pytest.approx(logs[0][weight], rel=0.05)
    assert logs[1] != logs[0]


# By the name that every release of transformers 5 has.
@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
def test_where_gradients_cannot_be_told_apart_balance_is_refused_and_shares_are_left_out(
    tmp_path: Path, student: Any, teacher: Any
):
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(RecipeError, match=r"^loss.balance gradient cannot measure the terms: activations are checkpo"):
        trainer_of(tmp_path, student, teacher, section={**WEIGHTS, "balance": "gradient"}, **reentrant)
    trainer = trainer_of(tmp_path, student, teacher, section=WEIGHTS, **reentrant)
    trainer.train()
    assert not any(key.startswith("share_") for key in trainer.state.log_history[0])


def scaled(student: Any, factor: float) -> Any:
    """A student that computes the same in a residual stream of another scale."""
    other = copy.deepcopy(student)
    for name, parameter in other.named_parameters():
        if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
            parameter.data.mul_(factor)
    return other


def test_the_scale_of_the_streams_does_not_change_what_a_student_learns_by_the_standardised_kind(
    student: Any, teacher: Any
):
    ids = torch.tensor([row["input_ids"] for row in rows(4)])
    found = []
    for factor in (1.0, 100.0):
        section = {"alpha": 0.5, "beta": 0.0, "gamma": 1.0, "delta": 1.0, "hidden": "standardised_mse"}
        objective = Objective.of(LossConfig.model_validate({**section, "dynamics": "standardised_mse"}))
        projectors = create_projectors(LAYER_MAP, student_dim=16, teacher_dim=32, seed=1)
        model = scaled(student, factor)
        distiller = Distiller(model, projectors, layer_map=LAYER_MAP, objective=objective)
        trainer_of_targets = UniversalDistillationTrainer(
            distiller, args=arguments(Path()), teacher_model=scaled(teacher, factor), train_dataset=rows(4)
        )
        batch = trainer_of_targets.with_all_it_takes({"input_ids": ids, "labels": ids})
        distiller(**batch)["loss"].backward()
        writers = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")
        found.append(
            {
                name: parameter.grad * (factor if name.endswith(writers) else 1.0)
                for name, parameter in distiller.named_parameters()
            }
        )
    for name, want in found[0].items():
        torch.testing.assert_close(found[1][name], want, rtol=2e-3, atol=1e-3 * float(want.abs().max()))


@pytest.mark.parametrize("kind", ["standardised_mse"])
def test_accumulated_batches_have_the_standardised_loss_of_one(tmp_path: Path, student: Any, teacher: Any, kind: str):
    losses = []
    for accumulated in (1, 4):
        batches = {"per_device_train_batch_size": 8 // accumulated, "gradient_accumulation_steps": accumulated}
        section = {**WEIGHTS, "hidden": kind, "dynamics": kind}
        trainer = trainer_of(tmp_path, student, teacher, section=section, data=rows(), **batches)
        trainer.train()
        losses.append([trainer.state.log_history[0][name] for name in ("loss_hidden", "loss_dynamics")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_data_set_without_a_length_has_no_first_rows_to_measure_the_teachers_scale_on(
    tmp_path: Path, student: Any, teacher: Any
):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(rows())

    trainer = trainer_of(tmp_path, student, teacher, section={**WEIGHTS, "hidden": "standardised_mse"}, data=Stream())
    with pytest.raises(RecipeError, match=r"^train_dataset has no length: what is measured on its first rows"):
        trainer.train()
