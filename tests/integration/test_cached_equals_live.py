"""Every stored tensor against a live forward of the teacher: exactly in float32, else within the stated error."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from cache.manifest import Manifest
from cache.reader import Reader
from pipeline.capture import CaptureRequest, capture, logsumexp_at
from pipeline.encodings import decode_hidden, decode_topk
from pipeline.forward import pad_rows
from pipeline.models import take_apart
from pipeline.precompute import precompute
from pipeline.recipe_file import load_recipe
from pipeline.run_index import find_run_rows

ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
    "phi3": {},
    "olmo2": {},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
}


def live(model: PreTrainedModel, rows: list[Tensor], block: int) -> dict[str, Tensor]:
    """The plain way: all hidden states, all logits, one row at a time and so without padding."""
    states, finals, logits = [], [], []
    for row in rows:
        captured: list[Tensor] = []

        def keep(_module: Any, _args: Any, output: Any, captured: list[Tensor] = captured) -> None:
            captured.append(output[0] if isinstance(output, tuple) else output)

        handle = take_apart(model).blocks[block].register_forward_hook(keep)
        with torch.no_grad():
            output = model(input_ids=row.unsqueeze(0), output_hidden_states=True, use_cache=False)
        handle.remove()
        states.append(captured[0][0])
        finals.append(output.hidden_states[-1][0])
        logits.append(output.logits[0])
    return {"hidden": torch.cat(states), "final": torch.cat(finals), "logits": torch.cat(logits)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_capture_of_rows_of_several_lengths_equals_each_row_alone(build_model, architecture):
    model = build_model(architecture, **ARCHITECTURES[architecture])
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 380, (length,), generator=generator) for length in (9, 24, 1, 17)]
    request = CaptureRequest(blocks=(0, 2, 3), k=10, temperatures=(1.0, 2.0, 3.0, 4.0), labels=True, final_state=True)
    got = capture(take_apart(model), rows, request, row_names=["a", "b", "c", "d"])
    for block in request.blocks:
        want = live(model, rows, block)
        assert torch.allclose(got.hidden_ND[block], want["hidden"], rtol=1e-4, atol=1e-4)
    logits = want["logits"]
    assert torch.allclose(got.final_state_ND, want["final"], rtol=1e-4, atol=1e-4)
    assert torch.allclose(got.top_logits_NK, logits.topk(10).values, rtol=1e-4, atol=1e-4)
    for temperature, values in got.logsumexp_N.items():
        assert torch.allclose(values, (logits / temperature).logsumexp(-1), rtol=1e-5, atol=1e-4)
    labels = torch.cat([torch.cat([row[1:], torch.tensor([-1])]) for row in rows])
    want_label = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).where(labels >= 0, 0.0)
    assert torch.allclose(got.label_logit_N, want_label, rtol=1e-4, atol=1e-4)


def test_temperatures_by_squaring_equal_temperatures_one_by_one():
    logits = 30 * torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    together = logsumexp_at(logits, [1.0, 2.0, 3.0, 4.0, 0.5])
    for temperature, values in together.items():
        assert torch.allclose(values, (logits / temperature).logsumexp(-1), rtol=1e-6, atol=1e-5)


def batches_of_store(recipe: Any) -> Any:
    """The rows of the eval selection, and a live capture of the same teacher batches that stage one ran."""
    run = find_run_rows(recipe)
    selection = run.selections["eval"]
    manifest = Manifest(run.store)
    columns = [name for name in manifest.columns() if selection.shard_names[0] in manifest.shards(name)]
    reader = Reader(run.store, selection, columns)
    return [reader.row(index) for index in range(len(reader))]


@pytest.mark.parametrize("encoding", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("packing", [True, False])
def test_every_stored_tensor_equals_a_live_forward(write_recipe: Callable[..., Path], encoding: str, packing: bool):
    recipe = load_recipe(
        write_recipe(
            data__packing=packing,
            data__sequence_length=24 if packing else 60,
            targets__hidden={"blocks": [0, 3], "encoding": encoding},
            targets__logits={"k": 16, "values": "float32" if encoding == "float32" else "float16"},
            loss__gamma=0.0,
        )
    )
    precompute(recipe, show_progress=False)
    rows = batches_of_store(recipe)
    model = AutoModelForCausalLM.from_pretrained(recipe.teacher.path, dtype=torch.float32)
    tokens = [torch.from_numpy(row["tokens"]["ids"].astype("int64")) for row in rows]
    assert len({len(ids) for ids in tokens}) > (0 if packing else 1)
    # The same batches as stage one ran, so that float32 has nothing to round differently.
    size, name = recipe.teacher.batch_size, f"/{encoding}"
    for start in range(0, len(rows), size):
        chosen = slice(start, start + size)
        compare_batch(model, tokens[chosen], rows[chosen], name, exact=encoding == "float32")


def compare_batch(model: PreTrainedModel, tokens: list[Tensor], rows: list[Any], encoding: str, *, exact: bool) -> None:
    ids, mask = pad_rows(tokens)
    kept: dict[int, Tensor] = {}
    parts = take_apart(model)
    handles = [
        parts.blocks[block].register_forward_hook(lambda _m, _a, out, block=block: kept.update({block: out}))
        for block in (0, 3)
    ]
    with torch.inference_mode():
        attention_mask = None if mask.all() else mask.long()
        output = model(input_ids=ids, attention_mask=attention_mask, use_cache=False, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    for index, (row, length) in enumerate(zip(rows, map(len, tokens), strict=True)):
        arrays = {
            column: {name: torch.from_numpy(value.copy()) for name, value in values.items()}
            for column, values in row.items()
        }
        logits = output.logits[index, :length]
        for block in (0, 3):
            check_hidden(arrays[f"hidden/{block}{encoding}"], kept[block][index, :length], encoding, exact=exact)
        check_logits(arrays, logits, tokens[index], exact=exact)
        final = arrays["logits/final"]["values"].float()
        want = output.hidden_states[-1][index, :length]
        assert ((final - want).abs() <= 2**-11 * want.abs() + 2**-25).all()


def check_hidden(arrays: dict[str, Tensor], want: Tensor, encoding: str, *, exact: bool) -> None:
    got = decode_hidden(arrays)
    if exact:
        assert torch.equal(got, want)
    elif encoding == "/int8":
        assert ((got - want).abs() <= 0.5 * arrays["scale"].unsqueeze(1) * arrays["spread"] + 1e-4).all()
    else:
        assert ((got - want).abs() <= (2**-11 if encoding == "/float16" else 2**-8) * want.abs() + 2**-25).all()


def check_logits(arrays: dict[str, Any], logits: Tensor, tokens: Tensor, *, exact: bool) -> None:
    for temperature in (1.0, 2.0, 3.0, 4.0):
        normaliser = arrays[f"logsumexp/{temperature:g}"]["values"]
        assert torch.allclose(normaliser, (logits / temperature).logsumexp(-1), rtol=1e-6, atol=1e-6)
    label_logit = arrays["label_logit"]["values"]
    labels = logits[:-1].gather(-1, tokens[1:].unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(label_logit[:-1], labels, rtol=1e-6, atol=1e-6)
    assert label_logit[-1] == 0
    values, ids = decode_topk(arrays[f"logits/topk/16/{'float32' if exact else 'float16'}"], k=16)
    top = logits.topk(16).values
    bound = 1e-6 * top.abs() if exact else 2**-11 * (top[:, :1] - top) + 2e-6
    assert ((values - top).abs() <= bound + 1e-6).all()
    assert torch.allclose(logits.gather(-1, ids), top, rtol=1e-6, atol=1e-6)
