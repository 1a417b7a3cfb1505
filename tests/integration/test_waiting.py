"""A step asks nothing of the device that it would have to wait for, whatever it learns from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training import trainer_of
from transformers import TrainerCallback
from waiting import Waits, waits

from coldstill.pipeline.precompute import precompute
from coldstill.pipeline.recipe.file import load_recipe

TOPK = {"kind": "topk", "k": 16, "temperatures": [1, 2]}
KINDS: dict[str, dict[str, Any]] = {
    "topk": {"targets__logits": TOPK},
    "draws": {"targets__logits": {**TOPK, "kind": "topk_sampled", "samples": 8}},
    "coded": {"targets__logits": {"kind": "final"}, "targets__hidden": {"encoding": "coded"}},
    "int8": {"targets__logits": {"kind": "final", "encoding": "int8"}, "targets__hidden": {"token_fraction": 0.5}},
    "scaled": {"targets__logits": TOPK, "loss__hidden": "standardised_mse", "loss__delta": 0.1},
    "weights": {"targets__logits": TOPK, "data__packing": False, "data__prompt_weight": 0.5},
}


class SecondStep(TrainerCallback):
    """Notes what the second step waits for, from the end of the first one on."""

    def __init__(self) -> None:
        self._watch, self.found = waits(), Waits()

    def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == 1:
            self.found = self._watch.__enter__()
        elif state.global_step == 2:
            self._watch.__exit__(None, None, None)


def questions(folder: Path, split: str) -> dict[str, Any]:
    """Questions and answers of several lengths."""
    rows = [{"question": f"{split} {'why ' * (n % 3)}?", "answer": f"because of {n * n}"} for n in range(12)]
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"path": "json", "data_files": str(folder / f"{split}.jsonl")}
    return {**source, "text_column": "answer", "prompt_column": "question"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_for_nothing_that_the_students_own_library_does_not_ask(
    write_recipe: Callable[..., Path], workplace: Path, kind: str
):
    asked = {**KINDS[kind]}
    if kind == "weights":
        asked |= {f"data__{split}": questions(workplace, split) for split in ("train", "eval")}
    recipe = load_recipe(write_recipe(**asked))
    precompute(recipe, show_progress=False)
    trainer, step = trainer_of(recipe), SecondStep()
    trainer.add_callback(step)
    trainer.train()
    assert step.found, "the student's own library asks whether rows are packed"
    assert not [place for place in step.found if "masking_utils" not in place], step.found
