"""What the trainer is given by hand and cannot train: one line, before the first step or at the batch that lacks it."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from live_pair import CPU, LAYER_MAP, arguments, distiller_of, ids_of, rows
from torch import nn
from transformers import default_data_collator

from coldstill.cache.errors import ColdstillError
from coldstill.pipeline.models.layer_map import create_layer_map
from coldstill.pipeline.models.projectors import create_projectors
from coldstill.pipeline.runtime.errors import DataError, ModelError, NonFiniteError, RecipeError, TargetError
from coldstill.pipeline.stage_two.distillation_trainer import UniversalDistillationTrainer
from coldstill.pipeline.stage_two.distiller import Distiller
from coldstill.pipeline.stage_two.live_targets import LiveTargets


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"beta": 0.5},
            "loss_logits has the weight beta = 0.5, but nothing gives the teacher's logits; give the trainer a",
        ),
        (
            {"beta": 0.0},
            "loss_hidden has the weight gamma = 0.1, but nothing gives the outputs of the teacher's blocks",
        ),
        ({"beta": 0.0, "gamma": 0.0, "delta": 0.3}, "loss_dynamics has the weight delta = 0.3, but nothing gives the"),
    ],
)
def test_a_term_that_nothing_gives_a_target_is_refused_before_the_first_step(
    student: Any, tmp_path: Path, weights: dict[str, float], message: str
):
    for model, own in ((distiller_of(student, **weights), {}), (student, {"layer_map": LAYER_MAP, **weights})):
        options = {} if model is not student else {"projectors": distiller_of(student).projectors, **own}
        with pytest.raises(TargetError, match=message):
            UniversalDistillationTrainer(model, arguments(tmp_path), train_dataset=rows(), **options)


@pytest.mark.parametrize(
    ("weights", "left_out", "message"),
    [
        ({}, ("logits", None), "loss_logits has the weight beta = 0.5, but a batch has no 'final' of the"),
        ({}, ("logits", "final"), "loss_logits has the weight beta = 0.5, but a batch has no 'final' of the"),
        ({}, ("hidden", None), "loss_hidden has the weight gamma = 0.1, but a batch has no output of teacher block 1"),
        ({}, ("hidden", "3"), "loss_hidden has the weight gamma = 0.1, but a batch has no output of teacher block 3"),
        (
            {"gamma": 0, "delta": 0.2},
            ("hidden", "3"),
            "loss_dynamics has the weight delta = 0.2, but a batch has no ou",
        ),
    ],
)
def test_a_batch_that_lacks_a_target_is_refused_although_the_one_before_had_it(
    student: Any,
    teacher: Any,
    tmp_path: Path,
    weights: dict[str, float],
    left_out: tuple[str, str | None],
    message: str,
):
    distiller = distiller_of(student, **weights)
    targets = LiveTargets.beside(distiller, teacher, CPU)
    distiller.forms = replace(distiller.forms, is_live=False)

    def collate(features: list[dict[str, Any]]) -> dict[str, Any]:
        """As a store's batches come, but one."""
        batch = default_data_collator([{"input_ids": row["input_ids"]} for row in features])
        batch |= targets(batch)
        if features[0]["is_bad"]:
            name, part = left_out
            batch[name] = {key: value for key, value in batch[name].items() if part not in (None, key)}
        return batch

    options = {"remove_unused_columns": False, "train_sampling_strategy": "sequential"}
    dataset = [{**row, "is_bad": index == 3} for index, row in enumerate(rows(4))]
    trainer = UniversalDistillationTrainer(
        distiller,
        arguments(tmp_path, max_steps=4, per_device_train_batch_size=1, **options),
        data_collator=collate,
        train_dataset=dataset,
    )
    with pytest.raises(TargetError, match=message):
        trainer.train()
    assert trainer.state.global_step == 3


def test_a_teacher_that_gives_a_nan_is_named_before_the_student_learns_from_it(
    student: Any, build_model: Callable[..., Any], tmp_path: Path
):
    before = {name: value.clone() for name, value in student.state_dict().items()}
    teacher = build_model()
    teacher.model.layers[0].mlp.down_proj.weight.data.fill_(math.nan)
    trainer = UniversalDistillationTrainer(
        student,
        arguments(tmp_path, max_steps=1),
        teacher_model=teacher,
        layer_map=LAYER_MAP,
        train_dataset=rows(),
    )
    with pytest.raises(NonFiniteError, match="non-finite value: row 0 of a batch, block 1, position 0; dtype float32"):
        trainer.train()
    assert all(value.equal(before[name]) for name, value in student.state_dict().items())


def cut_from(teacher: Any, student: Any) -> Any:
    """A student of the teacher's own last blocks, and otherwise of its own weights."""
    student.model.layers = teacher.model.layers[2:]
    return student


REFUSED: dict[str, tuple[Callable[..., dict[str, Any]], type[ColdstillError], str]] = {
    "a path for a teacher": (
        lambda s, t, b: {"model": s, "teacher_model": "models/teacher"},
        ModelError,
        "teacher_model is a str; expected a causal language model, as AutoModelForCausalLM.from_pretrained gives",
    ),
    "a module for a student": (
        lambda s, t, b: {"model": nn.Linear(2, 2), "teacher_model": t},
        ModelError,
        "model is a Linear; expected a causal language model",
    ),
    "a distiller with a second loss": (
        lambda s, t, b: {"model": distiller_of(s), "teacher_model": t, "alpha": 0.3, "layer_map": LAYER_MAP},
        RecipeError,
        "model is a Distiller, which has its own layer map, projectors and loss: leave out layer_map, alpha",
    ),
    "targets from two sides": (
        lambda s, t, b: {"model": reading(distiller_of(s), t), "teacher_model": t},
        RecipeError,
        "reads targets off its batches, and teacher_model would give them too",
    ),
    "another vocabulary": (
        lambda s, t, b: {"model": s, "teacher_model": b(vocab_size=400), "layer_map": LAYER_MAP},
        ModelError,
        "different vocabularies: 400 entries against 384",
    ),
    "a block that the teacher lacks": (
        lambda s, t, b: {"model": s, "teacher_model": t, "layer_map": {0: 1, 1: 4}},
        RecipeError,
        "layer_map names teacher block 4; the teacher has blocks 0 to 3",
    ),
    "a block that the student lacks": (
        lambda s, t, b: {"model": s, "teacher_model": t, "layer_map": create_layer_map(3, 4)},
        RecipeError,
        "layer_map names student block 2; the student has blocks 0 to 1",
    ),
    "no layer map": (
        lambda s, t, b: {"model": s, "teacher_model": t, "gamma": 0.1},
        RecipeError,
        "gamma = 0.1 needs a layer_map of at least 1 pairs of student and teacher block, got 0; map more",
    ),
    "changes of one block": (
        lambda s, t, b: {"model": s, "teacher_model": t, "layer_map": {1: 3}, "delta": 0.1},
        RecipeError,
        "delta = 0.1 needs a layer_map of at least 2 pairs of student and teacher block, got 1",
    ),
    "too few projectors": (
        lambda s, t, b: {
            "model": s,
            "teacher_model": t,
            "layer_map": LAYER_MAP,
            "projectors": create_projectors(student_dim=16, teacher_dim=32, n_layers=1),
        },
        RecipeError,
        "layer_map maps student block 1, but there is no projector for it; projectors has: 0",
    ),
    "projectors of another student": (
        lambda s, t, b: {
            "model": s,
            "teacher_model": t,
            "layer_map": LAYER_MAP,
            "projectors": create_projectors(student_dim=12, teacher_dim=32, n_layers=2),
        },
        RecipeError,
        "projector 0 does not take float32 states of the student's width 16: mat1 and mat2",
    ),
    "projectors to another teacher": (
        lambda s, t, b: {
            "model": s,
            "teacher_model": t,
            "layer_map": LAYER_MAP,
            "projectors": create_projectors(student_dim=16, teacher_dim=16, n_layers=2),
        },
        RecipeError,
        "projector 0 gives width 16 for the student's 16; expected the teacher's 32",
    ),
    "a student that is its own teacher": (
        lambda s, t, b: {"model": t, "teacher_model": t, "layer_map": {0: 0}},
        ModelError,
        "student and teacher_model share weights, such as model.embed_tokens.weight: .* copy.deepcopy",
    ),
    "a student cut from the teacher itself": (
        lambda s, t, b: {"model": cut_from(t, b(num_hidden_layers=2)), "teacher_model": t, "layer_map": LAYER_MAP},
        ModelError,
        "share weights, such as model.layers.0.self_attn.q_proj.weight",
    ),
    "a temperature of 0": (
        lambda s, t, b: {"model": s, "teacher_model": t, "layer_map": LAYER_MAP, "temperature": 0.0},
        RecipeError,
        "temperature in UniversalDistillationTrainer: Input should be greater than 0, got 0.0",
    ),
    "no weight at all": (
        lambda s, t, b: {"model": s, "teacher_model": t, "alpha": 0, "beta": 0, "gamma": 0},
        RecipeError,
        "alpha, beta, gamma and delta are all 0",
    ),
    "metrics that nobody would compute": (
        lambda s, t, b: {"model": s, "teacher_model": t, "layer_map": LAYER_MAP, "compute_metrics": len},
        RecipeError,
        "compute_metrics would have no effect",
    ),
    "a loss that nobody would compute": (
        lambda s, t, b: {"model": s, "teacher_model": t, "layer_map": LAYER_MAP, "compute_loss_func": len},
        RecipeError,
        "compute_loss_func would have no effect",
    ),
}


def reading(distiller: Distiller, teacher: Any) -> Distiller:
    """A distiller that reads what a store keeps."""
    distiller.forms = replace(LiveTargets.beside(distiller, teacher, CPU).forms, is_live=False)
    return distiller


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_one_line_before_anything_runs(
    student: Any, teacher: Any, build_model: Callable[..., Any], tmp_path: Path, case: str
):
    given, error, message = REFUSED[case]
    options = given(student, teacher, build_model)
    with pytest.raises(error, match=message) as raised:
        UniversalDistillationTrainer(**options, args=arguments(tmp_path), train_dataset=rows())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"input_ids": ids_of(6, 0), "token_type_ids": [0] * 6},
            "a batch holds input_ids, token_type_ids; training",
        ),
        ({"labels": ids_of(6, 0)}, "a batch holds labels; training takes input_ids"),
        ({"input_ids": ids_of(6, 0), "labels": 1}, r"labels of shape \[4\] for input_ids of shape \[4, 6\]"),
    ],
)
def test_a_batch_that_would_be_taken_wrongly_is_refused(
    student: Any, teacher: Any, tmp_path: Path, row: dict[str, Any], message: str
):
    trainer = UniversalDistillationTrainer(
        student,
        arguments(tmp_path, max_steps=1, per_device_train_batch_size=4, remove_unused_columns=False),
        teacher_model=teacher,
        layer_map=LAYER_MAP,
        train_dataset=[row] * 4,
    )
    with pytest.raises(DataError, match=message):
        trainer.train()
    with pytest.raises(DataError, match=message):
        trainer.evaluate([row] * 4)
