"""A teacher that streams in block by block says what it says when it is loaded whole, byte for byte."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crash.trees import difference, files_below, lasting_files_below

import coldstill.cache.rows
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.precompute import precompute
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.recipe.sections import Recipe

# The architectures that the README names, and what their tiny configs need.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
    "phi3": {},
    "olmo": {},
    "olmo2": {},
    # Its files have a tensor for each expert, which transformers joins.
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
ALL_KINDS = {
    "logits": {"kind": "topk_sampled", "k": 12, "samples": 5, "temperatures": [1, 2]},
    "hidden": {"blocks": [0, 3], "inputs": [0, 2], "encoding": "coded", "token_fraction": 0.5},
}


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coldstill.cache.rows, "SHARD_TOKENS", 96)


@pytest.fixture
def placed(write_recipe: Callable[..., Path], workplace: Path) -> Callable[..., Recipe]:
    """Make a recipe of a placement, with a cache and output of its own."""

    def recipe(placement: str, **changes: Any) -> Recipe:
        places = {"output": str(workplace / placement / "run"), "cache": str(workplace / placement / "caches")}
        keys = {"teacher__placement": placement, **places, **changes}
        return load_recipe(write_recipe(**keys))

    return recipe


def stored(recipe: Recipe) -> dict[str, bytes]:
    precompute(recipe, show_progress=False)
    return files_below(Path(recipe.cache) / "stores")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_streamed_teacher_writes_the_same_store(
    placed: Callable[..., Recipe], build_model: Any, workplace: Path, architecture: str
):
    build_model(architecture, **ARCHITECTURES[architecture]).save_pretrained(workplace / "teacher")
    # Documents of several lengths, so that batches are padded.
    changes = {"targets": ALL_KINDS, "loss__gamma": 0.0, "data__packing": False, "data__sequence_length": 40}
    changes["data__train__max_rows"] = 9
    whole, streamed = (stored(placed(placement, **changes)) for placement in ("whole", "streamed"))
    assert len([name for name in whole if name.endswith("zarr.json")]) > 20
    assert difference(streamed, whole) == {}
