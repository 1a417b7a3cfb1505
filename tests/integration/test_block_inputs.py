"""The inputs of decoder blocks as targets of their own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from coldstill.cache.manifest import Manifest
from coldstill.cache.reader import Reader
from coldstill.pipeline.outputs.run_index import find_run_rows
from coldstill.pipeline.recipe.file import load_recipe


@pytest.mark.parametrize("encoding", ["float32", "coded"])
def test_an_input_is_what_stands_in_front_of_its_block(
    write_recipe: Callable[..., Path], coldstill: Callable[..., Any], workplace: Path, encoding: str
):
    hidden = {"blocks": [1], "inputs": [0, 2], "encoding": encoding}
    recipe = write_recipe(targets={"logits": {"kind": "none"}, "hidden": hidden}, loss__beta=0.0, loss__gamma=0.0)
    coldstill("precompute", recipe)
    form = "coded_0.2" if encoding == "coded" else encoding
    verified = json.loads(coldstill("cache", "verify", workplace / "caches", "--live", 8, "--json").stdout)["live"]
    checked = {column["column"]: column for column in verified["columns"]}
    assert verified["is_within"]
    assert {f"hidden_input/{block}/{form}" for block in (0, 2)} <= checked.keys()
    assert json.loads(coldstill("train", recipe, "--json").stdout)["trained_steps"] == 4
    if encoding == "coded":
        return
    run = find_run_rows(load_recipe(recipe))
    names = ["tokens", "hidden_input/0/float32", "hidden_input/2/float32", "hidden/1/float32"]
    row = Reader(run.store, run.selections["train"], names).row(0)
    model = AutoModelForCausalLM.from_pretrained(workplace / "teacher", dtype=torch.float32)
    embedded = model.get_input_embeddings()(torch.from_numpy(row["tokens"]["ids"].astype("int64")))
    assert torch.equal(torch.from_numpy(row["hidden_input/0/float32"]["values"].copy()), embedded)
    # In a Llama the input of a block is the output of the one before.
    assert (row["hidden_input/2/float32"]["values"] == row["hidden/1/float32"]["values"]).all()
    assert not [name for name in Manifest(run.store).columns() if name.startswith("hidden_input/1")]


def test_a_block_that_is_not_there_has_no_input(write_recipe: Callable[..., Path], coldstill: Callable[..., Any]):
    recipe = write_recipe(targets__hidden={"inputs": [0, 4]})
    said = coldstill("precompute", recipe, expect=2).stderr
    assert "targets.hidden.inputs names block 4; the teacher has blocks 0 to 3" in said
