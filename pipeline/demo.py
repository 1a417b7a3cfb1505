"""The demo: everything from a text to a recovered student, on two cores, without a network.

A small tokenizer and a small Llama are trained on the built-in corpus, once, and kept; from there the demo is the
stages on `configs/demo.yaml`, as anybody would run them.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments, set_seed

from coldstill.pipeline.evaluate import Evaluation, evaluate
from coldstill.pipeline.precompute import precompute
from coldstill.pipeline.recipe.file import dump_recipe, parse_recipe
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.recipe.yaml_text import parse_yaml
from coldstill.pipeline.rows.building import build_rows
from coldstill.pipeline.rows.builtin_corpus import documents
from coldstill.pipeline.runtime.interruptions import signals_wait, what_stays
from coldstill.pipeline.runtime.whole import whole_folder, write_whole
from coldstill.pipeline.stage_two.resumable_trainer import (
    ResumableTrainer,
    newest_checkpoint,
    sweep_checkpoints,
    where_it_stands,
)
from coldstill.pipeline.train import train

_VOCAB_SIZE = 1024
_END_OF_TEXT = "<|endoftext|>"
_SEED = 0


@dataclass(frozen=True)
class DemoResult:
    """What the demo made, and where it is.

    Attributes:
        evaluation: Teacher, pruned and recovered on held-out text.
        teacher: The teacher's folder.
        store: The store's folder.
        student: The recovered student's folder.
        recipe: The recipe, for the commands.
        computed_tokens: Tokens that the teacher read in this run; 0 where the store was complete.
        seconds: Time of the whole run.
    """

    evaluation: Evaluation
    teacher: str
    store: str
    student: str
    recipe: str
    computed_tokens: int
    seconds: float


def run_demo(folder: Path, *, say: Callable[[str], None]) -> DemoResult:
    """Run the demo in a folder; what an earlier run completed there is used again. `say` hears of each step."""
    started = time.monotonic()
    recipe = demo_recipe(folder)
    teacher = Path(recipe.teacher.path)
    if not (teacher / "config.json").is_file():
        say(f"1/4 teacher: training a small Llama on the Python documentation, into {teacher}")
        _make_teacher(recipe, teacher)
    recipe_file = folder / "recipe.yaml"
    write_whole(recipe_file, dump_recipe(recipe))
    say("2/4 precompute: the teacher reads the text once, the student is pruned from it")
    computed = precompute(recipe)
    say("3/4 train: the student learns from the store, the teacher is gone")
    trained = train(recipe)
    say("4/4 evaluate")
    return DemoResult(
        evaluation=evaluate(recipe),
        teacher=str(teacher),
        store=computed.store,
        student=trained.student,
        recipe=str(recipe_file),
        computed_tokens=computed.computed_tokens,
        seconds=time.monotonic() - started,
    )


def demo_recipe(folder: Path) -> Recipe:
    """Return the shipped demo recipe with all of its paths below a folder."""
    data = parse_yaml(files("coldstill.configs").joinpath("demo.yaml").read_text(), name="configs/demo.yaml")
    data["teacher"]["path"] = str(folder / "teacher")
    data["output"] = str(folder / "run")
    data["cache"] = str(folder / "caches")
    return parse_recipe(data, name="configs/demo.yaml")


def _make_teacher(recipe: Recipe, folder: Path) -> None:
    checkpoints = folder.with_name("teacher-checkpoints")
    tokenizer = _train_tokenizer()
    model = _train_model(recipe, tokenizer, checkpoints)
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    shutil.rmtree(checkpoints)


def _train_tokenizer() -> PreTrainedTokenizerFast:
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(documents(), vocab_size=_VOCAB_SIZE, special_tokens=[_END_OF_TEXT], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token=_END_OF_TEXT, pad_token=_END_OF_TEXT)


def _train_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, checkpoints: Path) -> LlamaForCausalLM:
    # The teacher learns from the recipe's own train rows, more of them; the eval rows stay unseen.
    data = recipe.data.model_copy(update={"train": recipe.data.train.model_copy(update={"max_rows": None})})
    train_rows, _ = build_rows(data, tokenizer)
    set_seed(_SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=336,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=recipe.data.sequence_length,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=1600,
        per_device_train_batch_size=8,
        learning_rate=4e-3,
        lr_scheduler_type="cosine",
        warmup_steps=40,
        weight_decay=0.1,
        logging_steps=200,
        save_steps=400,
        save_total_limit=1,
        seed=_SEED,
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    trainer = ResumableTrainer(model, arguments, train_dataset=_TokenRows(train_rows.tokens))
    sweep_checkpoints(checkpoints)
    _, checkpoint = newest_checkpoint(checkpoints)
    with what_stays(lambda: where_it_stands(checkpoints, trainer)), signals_wait() as trainer.waiting:
        trainer.train(checkpoint)
    return model.eval()


class _TokenRows(Dataset[dict[str, Any]]):
    """Rows of token ids as a causal language model's Trainer takes them."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.from_numpy(self._rows[index].astype("int64"))
        return {"input_ids": ids, "labels": ids}
