"""Every stored tensor against a live forward of the teacher: exactly in float32, else within the stated error."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from coldstill.cache.manifest import Manifest
from coldstill.cache.reader import Reader
from coldstill.pipeline.models import take_apart
from coldstill.pipeline.models.forward import pad_rows
from coldstill.pipeline.outputs.run_index import find_run_rows
from coldstill.pipeline.precompute import precompute
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.stage_one.capture import capture
from coldstill.pipeline.targets.captured import CaptureRequest
from coldstill.pipeline.targets.encodings import StateForm, decode_state
from coldstill.pipeline.targets.stored_constants import read_codes
from coldstill.pipeline.targets.token_encodings import decode_tail, decode_topk
from coldstill.pipeline.targets.transform_coding import TransformCode

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
    request = CaptureRequest(
        blocks=(0, 2, 3), ks=(4, 10), temperatures=(1.0, 2.0, 3.0, 4.0), labels=True, final_state=True
    )
    got = capture(take_apart(model), rows, request, row_names=["a", "b", "c", "d"])
    for block in request.blocks:
        want = live(model, rows, block)
        assert torch.allclose(got.hidden_ND[block], want["hidden"], rtol=1e-4, atol=1e-4)
    logits = want["logits"]
    assert torch.allclose(got.final_state_ND, want["final"], rtol=1e-4, atol=1e-4)
    for k, (top_logits, top_ids) in got.top_NK.items():
        assert torch.allclose(top_logits, logits.topk(k).values, rtol=1e-4, atol=1e-4)
        assert torch.allclose(logits.gather(-1, top_ids), top_logits, rtol=1e-4, atol=1e-4)
    for temperature, values in got.logsumexp_N.items():
        assert torch.allclose(values, (logits / temperature).logsumexp(-1), rtol=1e-5, atol=1e-4)
    labels = torch.cat([torch.cat([row[1:], torch.tensor([-1])]) for row in rows])
    want_label = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).where(labels >= 0, 0.0)
    assert torch.allclose(got.label_logit_N, want_label, rtol=1e-4, atol=1e-4)


def batches_of_store(recipe: Any) -> Any:
    """The rows of the eval selection, and a live capture of the same teacher batches that stage one ran."""
    run = find_run_rows(recipe)
    selection = run.selections["eval"]
    manifest = Manifest(run.store)
    columns = [name for name in manifest.columns() if selection.shard_names[0] in manifest.shards(name)]
    reader = Reader(run.store, selection, columns)
    return [reader.row(index) for index in range(len(reader))]


@pytest.mark.parametrize("encoding", ["float32", "bfloat16", "float16", "int8", "coded"])
@pytest.mark.parametrize("packing", [True, False])
def test_every_stored_tensor_equals_a_live_forward(write_recipe: Callable[..., Path], encoding: str, packing: bool):
    recipe = load_recipe(
        write_recipe(
            data__packing=packing,
            data__sequence_length=24 if packing else 60,
            targets__hidden={"blocks": [0, 3], "encoding": encoding},
            targets__logits={"kind": "topk", "k": 16, "values": "float32" if encoding == "float32" else "delta"},
            loss__gamma=0.0,
        )
    )
    precompute(recipe, show_progress=False)
    rows, codes = batches_of_store(recipe), codes_of_store(recipe)
    model = AutoModelForCausalLM.from_pretrained(recipe.teacher.path, dtype=torch.float32)
    tokens = [torch.from_numpy(row["tokens"]["ids"].astype("int64")) for row in rows]
    assert len({len(ids) for ids in tokens}) > (0 if packing else 1)
    # The same batches as stage one ran, so that float32 has nothing to round differently.
    size, name = recipe.teacher.batch_size, "coded_0.2" if encoding == "coded" else encoding
    for start in range(0, len(rows), size):
        chosen = slice(start, start + size)
        compare_batch(model, tokens[chosen], rows[chosen], name, codes, exact=encoding == "float32")


def codes_of_store(recipe: Any) -> dict[str, TransformCode]:
    store = find_run_rows(recipe).store
    manifest = Manifest(store)
    return read_codes(store, manifest, manifest.columns())


def compare_batch(
    model: PreTrainedModel,
    tokens: list[Tensor],
    rows: list[Any],
    form: str,
    codes: dict[str, TransformCode],
    *,
    exact: bool,
) -> None:
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
            name = f"hidden/{block}/{form}"
            check_states(arrays[name], kept[block][index, :length], form, codes.get(name))
        check_logits(arrays, logits, tokens[index], exact=exact)
        final = arrays["logits/final/float16"]["values"].float()
        want = output.hidden_states[-1][index, :length]
        assert ((final - want).abs() <= 2**-11 * want.abs() + 2**-25).all()


def check_states(arrays: dict[str, Tensor], want: Tensor, form: str, code: TransformCode | None) -> None:
    """Hold decoded states to the error that their form states."""
    got = decode_state(arrays, form=StateForm.parse(form), code=code)
    if form == "float32":
        assert torch.equal(got, want)
    elif form == "int8":
        assert ((got - want).abs() <= 0.5 * arrays["scale"].unsqueeze(1) * arrays["spread"] + 1e-4).all()
    elif code is not None:
        step = StateForm.parse(form).step
        assert (((got - want) @ code.analysis_DD).abs() <= 0.5 * step + 1e-3).all()
        assert not torch.equal(got, want)
    else:
        assert ((got - want).abs() <= (2**-11 if form == "float16" else 2**-8) * want.abs() + 2**-25).all()


def check_logits(arrays: dict[str, Any], logits: Tensor, tokens: Tensor, *, exact: bool) -> None:
    for temperature in (1.0, 2.0, 3.0, 4.0):
        normaliser = arrays[f"logsumexp/{temperature:g}"]["values"]
        assert torch.allclose(normaliser, (logits / temperature).logsumexp(-1), rtol=1e-6, atol=1e-6)
    label_logit = arrays["label_logit"]["values"]
    labels = logits[:-1].gather(-1, tokens[1:].unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(label_logit[:-1], labels, rtol=1e-6, atol=1e-6)
    assert label_logit[-1] == 0
    values, ids = decode_topk(arrays[f"logits/topk/16/{'float32' if exact else 'delta'}"], k=16)
    top = logits.topk(16).values
    bound = 1e-6 * top.abs() if exact else torch.full_like(top, 0.01 + 4e-6)
    assert ((values - top).abs() <= bound + 1e-6).all()
    assert torch.allclose(logits.gather(-1, ids), top, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("encoding", ["coded", "int8"])
def test_stored_draws_final_states_and_random_positions_equal_a_live_forward(
    write_recipe: Callable[..., Path], encoding: str
):
    """Every kind of column that depends on chance or on a calibration, against the same teacher live."""
    hidden = {"blocks": [1], "encoding": encoding, "token_fraction": 0.5}
    sampled = {"kind": "topk_sampled", "k": 12, "samples": 9, "temperatures": [1, 2]}
    for logits in (sampled, {"kind": "final", "encoding": encoding}):
        recipe = load_recipe(write_recipe(targets={"logits": logits, "hidden": hidden}, loss__gamma=0.0))
        precompute(recipe, show_progress=False)
    rows, codes = batches_of_store(recipe), codes_of_store(recipe)
    model = AutoModelForCausalLM.from_pretrained(recipe.teacher.path, dtype=torch.float32)
    final = f"logits/final/{'coded_0.03' if encoding == 'coded' else 'int8'}"
    name = f"hidden/1/{'coded_0.2' if encoding == 'coded' else 'int8'}_sampled_0.5"
    for row in rows:
        arrays = {
            column: {array: torch.from_numpy(values.copy()) for array, values in values_of.items()}
            for column, values_of in row.items()
        }
        got = live(model, [torch.from_numpy(row["tokens"]["ids"].astype("int64"))], 1)
        check_states(arrays[final], got["final"], final.rsplit("/", 1)[-1], codes.get(final))
        stored = arrays[name]["stored"].bool()
        at_stored = {
            array: values[stored] if len(values) == len(stored) and array not in ("centre", "spread") else values
            for array, values in arrays[name].items()
        }
        form = name.rsplit("/", 1)[-1].partition("_sampled_")[0]
        check_states(at_stored, got["hidden"][stored], form, codes.get(name))
        check_tail(arrays["logits/tail/12_9/1_2"], got["logits"], k=12)


def check_tail(arrays: dict[str, Tensor], logits: Tensor, *, k: int) -> None:
    values, ids, log_weights = decode_tail(arrays)
    assert ((values - logits.gather(-1, ids)).abs() <= 0.01 + 1e-4).all()
    is_head = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(k).indices, True)
    assert not is_head.gather(-1, ids).any()
    tail = logits.masked_fill(is_head, -torch.inf)
    proposal = (tail.softmax(-1) + (tail / 2).softmax(-1)) / 2
    want = -(ids.shape[-1] * proposal.gather(-1, ids)).log()
    # float16, and what float32 has to round in another batch: a tail that began a token later would be off by 0.01.
    assert ((log_weights - want).abs() <= 2**-11 * want.abs() + 2e-4).all()
