"""One arm of benchmarks/train_step.py: a process that takes one training step for each line that it reads.

Every arm trains through the transformers Trainer, four rows a step, on the rows of a Coldstill store. A step is timed
from the wait for its batch to the end of the optimizer's update.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, default_data_collator
from turns import reporting, wait_for_turn

from coldstill.cache.tokens import TOKENS
from coldstill.pipeline.models.forward import block_outputs
from coldstill.pipeline.models.pairing import layer_map_of
from coldstill.pipeline.outputs.run_index import find_run_rows
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.runtime.peak_memory import peak_memory_bytes
from coldstill.pipeline.stage_two.setup import create_trainer
from coldstill.pipeline.students.folders import find_student

_LARGEST = 16


def main() -> None:
    options = parse()
    report = reporting()
    overrides = [f"train.max_steps={options.steps}", "train.report_to=none", "train.disable_tqdm=true"]
    recipe = load_recipe(options.recipe, [*overrides, f"train.bf16={str(options.precision == 'bf16').lower()}"])
    trainer = make_trainer(options.arm, recipe)
    trainer.add_callback(Profiled(report, options.steps) if options.profile else Turns(report))
    trainer.train()
    report({"peak_bytes": peak_memory_bytes()})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm", choices=["plain", "topk", "selective", "final", "live"])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("precision", choices=["float32", "bf16"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--profile", action="store_true")
    return parser.parse_args()


def make_trainer(arm: str, recipe: Recipe) -> Trainer:
    trainer = create_trainer(recipe, find_run_rows(recipe), find_student(recipe))
    if arm in ("topk", "selective", "final"):
        return trainer
    # What decides a step's cost stays the recipe's; only the model, the loss and the rows are other ones.
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        **recipe.train,
        use_cpu=trainer.args.use_cpu,
        dataloader_pin_memory=not trainer.args.use_cpu,
    )
    rows = TokenRows(trainer.train_dataset)
    student = trainer.model.student
    if arm == "plain":
        return Trainer(student, arguments, train_dataset=rows, data_collator=default_data_collator)
    model = LiveDistillation(student, load_teacher(recipe, arguments), recipe)
    return Trainer(model, arguments, train_dataset=rows, data_collator=default_data_collator)


class TokenRows(Dataset):
    """The token ids of stored rows, as a plain language modelling data set has them."""

    def __init__(self, stored: Any) -> None:
        self._rows = [
            torch.from_numpy(stored[index].arrays[TOKENS]["ids"].astype("int64")) for index in range(len(stored))
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._rows[index], "labels": self._rows[index]}


def load_teacher(recipe: Recipe, arguments: TrainingArguments) -> nn.Module:
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    return AutoModelForCausalLM.from_pretrained(recipe.teacher.path, dtype=dtype).to(arguments.device).eval()


class LiveDistillation(nn.Module):
    """The recipe's loss with the teacher in memory: dense logits, the same mapped blocks, one forward of each model."""

    accepts_loss_kwargs = True

    def __init__(self, student: nn.Module, teacher: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.student, self.config = student, student.config
        self._teacher = [teacher]  # in a list: it is no part of what is trained and saved
        self._loss = recipe.loss
        self._map = layer_map_of(recipe.mapping, student.config, num_teacher_blocks=teacher.config.num_hidden_layers)

    def forward(self, input_ids: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Any:
        teacher = self._teacher[0]
        with torch.no_grad(), block_outputs(teacher.model.layers, list(self._map.values())) as of_teacher:
            teacher_logits = teacher(input_ids, use_cache=False).logits[:, :-1]
        with block_outputs(self.student.model.layers, list(self._map)) as of_student:
            logits = self.student(input_ids, use_cache=False).logits[:, :-1]
        temperature, count = self._loss.temperature, labels[:, 1:].numel()
        with torch.autocast(input_ids.device.type, enabled=False):
            task = F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten())
            log_q = (logits.float() / temperature).log_softmax(dim=-1)
            with torch.no_grad():
                log_p = (teacher_logits.float() / temperature).log_softmax(dim=-1)
            divergence = F.kl_div(log_q, log_p, log_target=True, reduction="sum") * temperature**2 / count
            hidden = torch.stack(
                [
                    F.mse_loss(of_student[student][:, :-1].float(), of_teacher[block][:, :-1].float())
                    for student, block in self._map.items()
                ]
            ).mean()
        return {"loss": self._loss.alpha * task + self._loss.beta * divergence + self._loss.gamma * hidden}


class Turns(TrainerCallback):
    """Waits for its turn before each step, and reports what the step took."""

    def __init__(self, report: Callable[[dict[str, Any]], None]) -> None:
        self._report = report

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._report({"ready": True})
        self._wait_for_turn()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._wait = time.perf_counter() - self._started

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._report({"seconds": time.perf_counter() - self._started, "wait": self._wait})
        if state.global_step < state.max_steps:
            self._wait_for_turn()

    def _wait_for_turn(self) -> None:
        wait_for_turn()
        self._started = time.perf_counter()


class Profiled(TrainerCallback):
    """Profiles all steps but the first, and reports the largest costs by operator, in seconds a step."""

    def __init__(self, report: Callable[[dict[str, Any]], None], steps: int) -> None:
        self._report, self._steps = report, steps - 1
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            self._profiler.start()
        if state.global_step == state.max_steps:
            self._profiler.stop()
            costs = {
                event.key: event.self_cpu_time_total / 1e6 / self._steps for event in self._profiler.key_averages()
            }
            self._report({"step": round(sum(costs.values()), 3)})
            for name, seconds in sorted(costs.items(), key=lambda cost: -cost[1])[:_LARGEST]:
                self._report({"operator": name, "seconds": round(seconds, 3)})


if __name__ == "__main__":
    main()
