"""Steps of training on a device, for benchmarks/gpu.py: how long they take, what they hold, how long they wait."""

import gc
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from step_arm import make_trainer
from transformers import Trainer, TrainerCallback

from coldstill.pipeline.recipe.sections import Recipe


class Clock(TrainerCallback):
    """Times the steps behind the first few, and counts what the host waits for within the last one.

    Args:
        device: Which has done all that it was given when time is taken.
        warm_steps: How many steps are not timed.
    """

    def __init__(self, device: torch.device, warm_steps: int) -> None:
        self._device, self._warm_steps = device, warm_steps
        self.waited = 0.0
        self.seconds = 0.0
        self._begun = 0.0

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step == self._warm_steps:
            self.waited, self._begun = 0.0, self.now()
        elif state.global_step == state.max_steps:
            self.seconds = self.now() - self._begun


class Waits(TrainerCallback):
    """Counts in the last step how often the host waits for the GPU, which says so itself."""

    def __init__(self) -> None:
        self.count = 0
        self._caught = warnings.catch_warnings(record=True)
        self._warned: Any = []

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps - 1:
            self._warned = self._caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        elif state.global_step == state.max_steps:
            torch.cuda.set_sync_debug_mode("default")
            self._caught.__exit__(None, None, None)
            self.count = sum("synchronizing" in str(warning.message) for warning in self._warned)


def step_figures(
    recipes: Mapping[str, Recipe], precision: str, steps: tuple[int, int], device: torch.device, has_live: bool
) -> Iterator[tuple[str, Any]]:
    """Yield what steps of each arm take, and what follows.

    Args:
        recipes: Of the arms `topk` and `final`.
        precision: `float32` or `bf16`.
        steps: How many come before time is taken, and how many are timed.
        device: Where they are taken.
        has_live: Whether there is an arm with the teacher in memory.
    """
    arms = {arm: steps_of(arm, recipes, precision, steps, device) for arm in ["plain", *recipes, *["live"] * has_live]}
    plain = arms["plain"]
    for arm, measured in arms.items():
        yield f"{precision}.{arm}", measured
    for arm in recipes:
        yield f"{precision}.{arm}_step_over_plain", round(arms[arm]["seconds"] / plain["seconds"], 3)
        yield f"{precision}.{arm}_waiting", round(arms[arm]["waited"] / arms[arm]["seconds"], 4)
        if device.type == "cuda":
            yield f"{precision}.{arm}_memory_over_plain", round(arms[arm]["peak_bytes"] / plain["peak_bytes"], 3)
    if has_live:
        yield f"{precision}.live_over_train", round(arms["live"]["seconds"] / arms["topk"]["seconds"], 3)
    if device.type == "cuda":
        yield f"{precision}.waits_of_a_step", {arm: waits_of(arm, recipes, precision) for arm in ("plain", *recipes)}


def steps_of(
    arm: str, recipes: Mapping[str, Recipe], precision: str, steps: tuple[int, int], device: torch.device
) -> dict[str, float]:
    """Take steps, and give the seconds and the waiting of one, tokens a second, and the most that was held."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer, clock = trainer_of(arm, recipes, precision, sum(steps)), Clock(device, steps[0])
    trainer.add_callback(clock)
    fetch = trainer.get_batch_samples

    def timed(*args: Any) -> Any:
        started = time.perf_counter()
        fetched = fetch(*args)
        clock.waited += time.perf_counter() - started
        return fetched

    trainer.get_batch_samples = timed
    trainer.train()
    recipe = recipes.get(arm, recipes["topk"])
    num_tokens = recipe.train["per_device_train_batch_size"] * recipe.data.sequence_length
    measured = {
        "seconds": round(clock.seconds / steps[1], 5),
        "waited": round(clock.waited / steps[1], 5),
        "tokens_per_s": round(num_tokens * steps[1] / clock.seconds),
    }
    if device.type == "cuda":
        measured["peak_bytes"] = torch.cuda.max_memory_allocated()
    forget(trainer)
    return measured


def waits_of(arm: str, recipes: Mapping[str, Recipe], precision: str) -> int:
    trainer, waits = trainer_of(arm, recipes, precision, 3), Waits()
    trainer.add_callback(waits)
    trainer.train()
    forget(trainer)
    return waits.count


def trainer_of(arm: str, recipes: Mapping[str, Recipe], precision: str, num_steps: int) -> Trainer:
    recipe = recipes.get(arm, recipes["topk"])
    train = {**recipe.train, "max_steps": num_steps, "bf16": precision == "bf16", "fp16": precision == "fp16"}
    return make_trainer(arm, recipe.model_copy(update={"train": train}))


def forget(trainer: Trainer) -> None:
    """Let go of all that a trainer holds."""
    trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
