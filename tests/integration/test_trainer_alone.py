"""The trainer without recipe and store, as people who use transformers drive it: plain models, plain batches."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from live_pair import CPU, LAYER_MAP, LENGTHS, arguments, distiller_of, padded_batch, rows, uneven_rows
from safetensors.torch import load_file
from tiny import NARROW
from torch import nn
from torch.utils.data import IterableDataset
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Trainer,
    default_data_collator,
)
from versions import since

from coldstill.pipeline.models.layer_map import create_layer_map
from coldstill.pipeline.models.projectors import create_projectors
from coldstill.pipeline.stage_two.distillation_trainer import UniversalDistillationTrainer
from coldstill.pipeline.stage_two.live_targets import LiveTargets


def test_the_books_usage_trains_student_and_projectors_and_leaves_the_teacher_alone(build_model, tmp_path: Path):
    teacher = build_model(num_hidden_layers=24, hidden_size=24).train()
    student = build_model(seed=1, num_hidden_layers=20, hidden_size=16, num_attention_heads=2)
    dataset, training_args = (
        rows(),
        arguments(tmp_path, max_steps=8, learning_rate=5e-3, save_steps=4, per_device_train_batch_size=4),
    )
    was = {name: value.clone() for name, value in teacher.state_dict().items()}

    layer_map = create_layer_map(n_student=20, n_teacher=24, strategy="last")
    projectors = create_projectors(student_dim=16, teacher_dim=24, n_layers=20)
    before = {name: value.clone() for name, value in projectors.state_dict().items()}
    trainer = UniversalDistillationTrainer(
        model=student,
        teacher_model=teacher,
        layer_map=layer_map,
        projectors=projectors,
        alpha=0.5,
        beta=0.3,
        gamma=0.2,
        temperature=2.0,
        args=training_args,
        train_dataset=dataset,
    )
    trainer.train()

    first, *_, last = [entry for entry in trainer.state.log_history if "loss" in entry]
    for term in ("loss", "loss_task", "loss_logits", "loss_hidden"):
        assert last[term] < first[term], term
    weighted = 0.5 * first["loss_task"] + 0.3 * first["loss_logits"] + 0.2 * first["loss_hidden"]
    assert first["loss"] == pytest.approx(weighted)
    assert len(before) == 20
    assert not any(torch.equal(value, before[name]) for name, value in projectors.state_dict().items())
    assert all(torch.equal(value, was[name]) for name, value in teacher.state_dict().items())
    assert all(value.grad is None for value in teacher.parameters())
    assert not teacher.training

    trainer.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "checkpoint-8", tmp_path / "saved"):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert loaded.config.num_hidden_layers == 20
        for name, value in student.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
        assert len(load_file(folder / "projectors.safetensors")) == 20
    moments = torch.load(tmp_path / "checkpoint-8/optimizer.pt", weights_only=True)["state"]
    assert len(moments) == len(list(student.parameters())) + 20


def batch_of(habit: str) -> dict[str, torch.Tensor]:
    """Rows of several lengths as people lay them: the labels that they give, or None."""
    if habit == "even, the ids":
        return default_data_collator([{**row, "labels": row["input_ids"]} for row in rows(4)])
    if habit == "prompts left out":
        return default_data_collator([{**row, "labels": [-100] * 7 + row["input_ids"][7:]} for row in rows(4)])
    return padded_batch(habit.split()[0])


@pytest.mark.parametrize("habit", ["even, the ids", "prompts left out", "right padding", "left padding"])
def test_labels_mean_what_they_mean_to_transformers(student: Any, habit: str):
    batch = batch_of(habit)
    with torch.no_grad():
        want = student(**batch).loss
        got = distiller_of(student, alpha=1.0, beta=0, gamma=0)(**batch)
    torch.testing.assert_close(got["loss_task"], want)
    torch.testing.assert_close(got["loss"], want)


@pytest.mark.parametrize("habit", ["even, the ids", "right padding"])
def test_without_labels_every_token_but_padding_counts(student: Any, habit: str):
    batch = batch_of(habit)
    distiller = distiller_of(student, alpha=1.0, beta=0, gamma=0)
    with torch.no_grad():
        want = distiller(**batch)
        got = distiller(**{name: values for name, values in batch.items() if name != "labels"})
    assert torch.equal(got["loss"], want["loss"])


def test_without_labels_nothing_is_predicted_from_padding(student: Any):
    batch = padded_batch("left")
    labels = batch.pop("labels")
    for row, length in enumerate(LENGTHS):
        labels[row, -length] = -100
    distiller = distiller_of(student, alpha=1.0, beta=0, gamma=0)
    with torch.no_grad():
        assert torch.equal(distiller(**batch)["loss"], distiller(**batch, labels=labels)["loss"])


def padded(tokenizer: Any) -> DataCollatorForLanguageModeling:
    return DataCollatorForLanguageModeling(tokenizer, mlm=False)


@since("5.10")  # the plain Trainer before it divides by a count that has a position too many in each row
def test_with_the_cross_entropy_alone_it_trains_as_the_plain_trainer_does(
    build_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
):
    options = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    options |= {"learning_rate": 0.01, "save_strategy": "no", "optim": "sgd"}
    trained = {}
    for name in ("plain", "ours"):
        model = build_model(seed=1, **NARROW)
        common = {"args": arguments(tmp_path, **options), "train_dataset": uneven_rows()}
        common["data_collator"] = padded(tokenizer)
        if name == "plain":
            trainer = Trainer(model, **common)
        else:
            trainer = UniversalDistillationTrainer(model, alpha=1.0, beta=0, gamma=0, **common)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trained[name] = losses, dict(model.named_parameters())
    assert trained["ours"][0] == pytest.approx(trained["plain"][0], rel=1e-4)
    for name, value in trained["plain"][1].items():
        torch.testing.assert_close(trained["ours"][1][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("labelled", [True, False])
def test_accumulated_rows_of_several_lengths_train_as_the_whole_batch(
    build_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, labelled: bool
):
    def collate(features: list[dict[str, Any]]) -> Any:
        batch = padded(tokenizer)(features)
        return batch if labelled else {name: batch[name] for name in ("input_ids", "attention_mask")}

    trained = {}
    for batch_size, accumulation in ((8, 1), (1, 8)):
        model = build_model(seed=1, **NARROW)
        trainer = UniversalDistillationTrainer(
            model,
            teacher_model=build_model(),
            layer_map=LAYER_MAP,
            alpha=0.5,
            beta=0.5,
            gamma=0.1,
            projectors=create_projectors(LAYER_MAP, student_dim=16, teacher_dim=32, seed=1),
            delta=0.2,
            args=arguments(
                tmp_path,
                max_steps=1,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
                learning_rate=0.1,
                optim="sgd",
                save_strategy="no",
            ),
            data_collator=collate,
            train_dataset=uneven_rows(),
        )
        trainer.train()
        trained[batch_size] = trainer.state.log_history[0], dict(trainer.model.named_parameters())
    (log, whole), (other_log, parts) = trained[8], trained[1]
    for term in ("loss", "loss_task", "loss_logits", "loss_hidden", "loss_dynamics"):
        assert other_log[term] == pytest.approx(log[term], rel=1e-4), term
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_and_neighbours_change_nothing_that_a_row_learns(student: Any, teacher: Any, side: str):
    distiller = distiller_of(student, delta=0.2)
    targets = LiveTargets.beside(distiller, teacher, CPU)

    def sums(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return distiller(**batch, **targets(batch), num_items_in_batch=1)

    batch = padded_batch(side)
    del batch["labels"]
    together = sums(batch)
    alone = [sums({"input_ids": torch.tensor([row["input_ids"]])}) for row in uneven_rows()]
    for name, value in together.items():
        torch.testing.assert_close(value, sum(each[name] for each in alone), rtol=1e-5, atol=1e-5)


def test_documents_in_one_row_keep_to_themselves_on_both_sides(student: Any, teacher: Any):
    distiller = distiller_of(student)
    targets = LiveTargets.beside(distiller, teacher, CPU)
    flat = dict(DataCollatorWithFlattening(return_tensors="pt")(uneven_rows()))
    assert flat["input_ids"].shape == (1, sum(LENGTHS))
    apart = padded_batch("right")
    with torch.no_grad():
        got, want = (distiller(**batch, **targets(batch)) for batch in (flat, apart))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(rows())


@pytest.mark.parametrize("kind", ["stream", "with a column of text", "labels of their own"])
def test_data_sets_of_every_kind_train_and_are_evaluated(student: Any, teacher: Any, tmp_path: Path, kind: str):
    dataset: Any = {
        "stream": Stream(),
        "with a column of text": Dataset.from_list([{**row, "text": "some text"} for row in rows()]),
        "labels of their own": [{**row, "labels": row["input_ids"]} for row in rows()],
    }[kind]
    trainer = UniversalDistillationTrainer(
        student,
        arguments(tmp_path, max_steps=2, per_device_train_batch_size=4, eval_strategy="steps", eval_steps=1),
        teacher_model=teacher,
        layer_map=LAYER_MAP,
        alpha=0.5,
        beta=0.5,
        train_dataset=dataset,
        eval_dataset=dataset,
    )
    trainer.train()
    first, last = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert last["eval_loss"] < first["eval_loss"]
    for entry in (first, last):
        terms = 0.5 * entry["eval_loss_task"] + 0.5 * entry["eval_loss_logits"] + 0.1 * entry["eval_loss_hidden"]
        assert entry["eval_loss"] == pytest.approx(terms)


def test_some_steps_then_resume_then_the_rest_equal_all_of_them(build_model: Callable[..., Any], tmp_path: Path):
    def trainer_in(folder: str) -> UniversalDistillationTrainer:
        return UniversalDistillationTrainer(
            build_model(seed=1, **NARROW),
            arguments(tmp_path / folder, max_steps=4, per_device_train_batch_size=4, save_steps=2),
            teacher_model=build_model(),
            layer_map=LAYER_MAP,
            projectors=create_projectors(LAYER_MAP, student_dim=16, teacher_dim=32, seed=1),
            train_dataset=rows(),
        )

    whole, resumed = trainer_in("whole"), trainer_in("whole")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert resumed.state.global_step == 4
    for (name, value), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_a_least_squares_start_takes_the_live_teachers_states(student: Any, teacher: Any, tmp_path: Path):
    trainer = UniversalDistillationTrainer(
        student, arguments(tmp_path), teacher_model=teacher, layer_map=LAYER_MAP, train_dataset=rows()
    )
    before = trainer.evaluate(rows())["eval_loss_hidden"]
    trainer.fit_projectors(8)
    assert trainer.evaluate(rows())["eval_loss_hidden"] < 0.9 * before


def test_lists_are_layer_map_and_projectors_too(student: Any, teacher: Any, tmp_path: Path):
    projectors = nn.ModuleList(nn.Linear(16, 32) for _ in range(2))
    trainer = UniversalDistillationTrainer(
        student, arguments(tmp_path), teacher_model=teacher, layer_map=[1, 3], projectors=projectors
    )
    assert trainer.layer_map == LAYER_MAP
    assert trainer.model.projectors["1"] is projectors[1]


def test_a_distiller_made_by_hand_learns_from_a_teacher_again_and_again(student: Any, teacher: Any, tmp_path: Path):
    distiller = distiller_of(student, delta=0.3)
    losses = []
    for _ in range(2):
        trainer = UniversalDistillationTrainer(
            distiller,
            arguments(tmp_path, max_steps=2, learning_rate=1e-3, save_strategy="no"),
            teacher_model=teacher,
            train_dataset=rows(),
        )
        trainer.train()
        losses += [entry["loss_dynamics"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(after < before for before, after in pairwise(losses))


def test_the_teacher_runs_in_its_own_dtype_whatever_the_student_trains_in(student: Any, teacher: Any):
    distiller = distiller_of(student)
    targets = LiveTargets.beside(distiller, teacher, CPU)
    batch = padded_batch("right")
    want = targets(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = targets(batch)
    assert torch.equal(got["logits"]["final"]["values"], want["logits"]["final"]["values"])
    assert torch.equal(got["hidden"]["3"]["values"], want["hidden"]["3"]["values"])
    half = targets.beside(distiller, teacher.to(torch.bfloat16), CPU)(batch)
    assert half["hidden"]["3"]["values"].dtype == torch.bfloat16


def test_models_in_bfloat16_train(build_model: Callable[..., Any], tmp_path: Path):
    trainer = UniversalDistillationTrainer(
        build_model(seed=1, **NARROW).to(torch.bfloat16),
        arguments(tmp_path, max_steps=6, learning_rate=1e-2, save_strategy="no"),
        teacher_model=build_model().to(torch.bfloat16),
        layer_map=LAYER_MAP,
        train_dataset=rows(),
    )
    trainer.train()
    first, *_, last = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert last["loss_logits"] < first["loss_logits"]


def test_a_batch_of_which_nothing_counts_changes_nothing(student: Any, teacher: Any):
    distiller = distiller_of(student)
    targets = LiveTargets.beside(distiller, teacher, CPU)
    batch = {"input_ids": torch.tensor([rows()[0]["input_ids"]]), "labels": torch.full((1, 24), -100)}
    terms = distiller(**batch, **targets(batch))
    terms["loss"].backward()
    assert all(value.item() == 0.0 for value in terms.values())
    assert all(value.grad is None or not value.grad.any() for value in distiller.parameters())
