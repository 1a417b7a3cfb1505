"""Every kind of logits target and every form of hidden state trains from the store through the command line."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LOGITS = {
    "topk": {"kind": "topk", "k": 16, "temperatures": [1, 2]},
    "sampled": {"kind": "topk_sampled", "k": 16, "samples": 8, "temperatures": [1, 2]},
    "coded": {"kind": "final"},
    "int8": {"kind": "final", "encoding": "int8"},
}


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("hidden", [{}, {"encoding": "coded", "token_fraction": 0.5}], ids=["int8", "coded"])
def test_a_run_of_both_stages(write_recipe: Callable[..., Path], coldstill: Callable[..., Any], kind: str, hidden: Any):
    recipe = write_recipe(targets={"logits": LOGITS[kind], "hidden": hidden})
    coldstill("precompute", recipe)
    assert "nothing: all columns are complete" in coldstill("precompute", recipe).output
    trained = json.loads(coldstill("train", recipe, "--json").stdout)
    assert {"loss_task", "loss_logits", "loss_hidden"} <= trained["losses"].keys()
    assert all(math.isfinite(value) for value in trained["losses"].values())
