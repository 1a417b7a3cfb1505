"""Arguments of transformers' Trainer in a recipe: which of them it owns, and what the others may be."""

import dataclasses

import pytest
from transformers import TrainingArguments
from versions import since

from coldstill.pipeline.recipe.training_keys import OWNED_KEYS, check_training_keys

WRONG = [
    ({"per_device_train_batch_size": 0}, "train.per_device_train_batch_size must be at least 1, got 0"),
    ({"per_device_eval_batch_size": -1}, "train.per_device_eval_batch_size must be at least 1, got -1"),
    ({"gradient_accumulation_steps": 0}, "train.gradient_accumulation_steps must be at least 1, got 0"),
    ({"save_total_limit": 0}, "train.save_total_limit must be at least 1, got 0"),
    ({"torch_empty_cache_steps": 0}, "train.torch_empty_cache_steps must be at least 1, got 0"),
    ({"dataloader_prefetch_factor": 0}, "train.dataloader_prefetch_factor must be at least 1, got 0"),
    ({"ddp_timeout": -1}, "train.ddp_timeout must be at least 1, got -1"),
    ({"learning_rate": -1}, "train.learning_rate must be at least 0, got -1.0"),
    ({"learning_rate": float("nan")}, "train.learning_rate must be a finite number, got nan"),
    ({"max_grad_norm": float("inf")}, "train.max_grad_norm must be a finite number, got inf"),
    ({"weight_decay": -0.1}, "train.weight_decay must be at least 0, got -0.1"),
    ({"adam_beta2": 1}, "train.adam_beta2 must be below 1, got 1.0"),
    ({"seed": -1}, "train.seed must be at least 0, got -1"),
    ({"seed": 2**32}, "train.seed must be below 4294967296, got 4294967296"),
    ({"data_seed": -1}, "train.data_seed must be at least 0, got -1"),
    ({"dataloader_num_workers": -1}, "train.dataloader_num_workers must be at least 0, got -1"),
    ({"dataloader_threads": -1}, "train.dataloader_threads must be at least 0, got -1"),
    ({"dataloader_threads": 1.5}, "train.dataloader_threads must be of type int, got 1.5"),
    ({"dataloader_threads": 2, "dataloader_num_workers": 1}, "train.dataloader_threads reads rows by threads and "),
    ({"warmup_steps": -1}, "train.warmup_steps must be at least 0, got -1.0"),
    ({"neftune_noise_alpha": -5}, "train.neftune_noise_alpha must be at least 0, got -5"),
    ({"eval_steps": -1}, "train.eval_steps must be above 0, got -1; for none set train.eval_strategy: 'no'"),
    ({"save_steps": 0}, "train.save_steps must be above 0, got 0.0; for none set train.save_strategy: 'no'"),
    ({"logging_steps": -5}, "train.logging_steps must be above 0, got -5.0; for none set train.logging_strategy: 'no'"),
    ({"data_seed": "x"}, "train.data_seed must be of type int | None, got 'x'"),
    ({"eval_steps": "often"}, "train.eval_steps must be of type float | None, got 'often'"),
    ({"optim": 3}, "train.optim must be of type "),
    ({"optim_args": "momentum"}, "train.optim_args must be pairs such as momentum=0.9,nesterov=true, got 'momentum'"),
    ({"lr_scheduler_kwargs": "x.json"}, "train.lr_scheduler_kwargs must be a map, got 'x.json'"),
    ({"log_level": "loud"}, "train.log_level must be detail, debug, info, warning, error, critical or passive, got "),
    ({"ddp_backend": "x"}, "train.ddp_backend must be nccl, gloo, mpi, xccl, hccl, cncl or mccl, got 'x'"),
    pytest.param(
        {"dataloader_multiprocessing_context": "x"},
        "train.dataloader_multiprocessing_context must be fork, spawn or ",
        marks=since("5.15"),
    ),
    ({"include_num_input_tokens_seen": "x"}, "train.include_num_input_tokens_seen must be true, false, all, non_"),
    ({"push_to_hub": True}, "train.push_to_hub is decided by coldstill report --push, which sends the student with"),
    ({"dataloader_in_order": False}, "train.dataloader_in_order is decided by the batches: the order of rows is a"),
    ({"bf16_full_eval": True}, "train.bf16_full_eval is decided by the losses: evaluation during training runs as"),
    ({"parallelism_config": {}}, "train.parallelism_config is decided by accelerate launch; remove it"),
    ({"fp16": True, "bf16": True}, "train.fp16 and train.bf16 are both true: set one of them to false"),
    ({"fp16": True, "use_cpu": True}, "train.fp16 needs an accelerator, but train.use_cpu is true"),
    ({"save_strategy": "best"}, "train.save_strategy best needs train.eval_strategy, epoch or steps, and "),
    ({"save_strategy": "best", "metric_for_best_model": "loss"}, "train.save_strategy best needs train.eval_strategy"),
]  # fmt: skip

RIGHT = [
    ({"eval_strategy": False}, {"eval_strategy": "no"}),
    ({"fsdp": True}, {"fsdp": True}),
    ({"learning_rate": 0, "max_grad_norm": 0}, {"learning_rate": 0.0, "max_grad_norm": 0.0}),
    ({"save_steps": 0.5, "warmup_steps": 0.1}, {"save_steps": 0.5, "warmup_steps": 0.1}),
    ({"report_to": ["tensorboard", "wandb"]}, {"report_to": ["tensorboard", "wandb"]}),
    ({"optim_args": "momentum=0.9,nesterov=true"}, {"optim_args": "momentum=0.9,nesterov=true"}),
    ({"activation_checkpointing": "selective"}, {"activation_checkpointing": "selective"}),
    ({"accelerator_config": {"split_batches": False}}, {"accelerator_config": {"split_batches": False}}),
]


@pytest.mark.parametrize(
    ("values", "message"), WRONG, ids=lambda value: ",".join(value) if isinstance(value, dict) else ""
)
def test_a_value_out_of_its_range_is_named_with_what_it_may_be(values, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        check_training_keys(values)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("values", "checked"), RIGHT)
def test_what_people_write_is_given_as_the_trainer_takes_it(values, checked):
    assert check_training_keys(values) == checked


def test_every_default_of_the_trainer_is_in_its_range():
    for field in dataclasses.fields(TrainingArguments):
        if field.init and field.name not in OWNED_KEYS and field.default is not dataclasses.MISSING:
            check_training_keys({field.name: field.default})


@since("5.15")
def test_every_owned_key_is_one_that_the_installed_trainer_knows():
    assert {field.name for field in dataclasses.fields(TrainingArguments)} >= OWNED_KEYS.keys()
