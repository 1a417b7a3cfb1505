"""On a GPU: loss and gradient of a CPU, nothing waited for, what threads bring, stated errors, the same bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training import gradients, trainer_of
from transformers import TrainerCallback

from coldstill.cache.manifest import Manifest
from coldstill.cache.store import open_store
from coldstill.pipeline.precompute import precompute
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.targets.encodings import StateForm, decode_state, encode_state, stated_error
from coldstill.pipeline.targets.transform_coding import fit_code

pytestmark = pytest.mark.gpu

LOGITS: dict[str, dict[str, Any]] = {
    "topk": {"kind": "topk", "k": 16, "temperatures": [1, 2]},
    "draws": {"kind": "topk_sampled", "k": 16, "samples": 8, "temperatures": [1, 2]},
    "final": {"kind": "final"},
}


@pytest.mark.parametrize("kind", LOGITS)
def test_loss_and_gradient_are_those_of_the_cpu(write_recipe: Callable[..., Path], kind: str):
    changes = {"targets__logits": LOGITS[kind], "train__dataloader_threads": 0}
    on_gpu = load_recipe(write_recipe(**changes))
    precompute(on_gpu, show_progress=False)
    on_cpu = load_recipe(write_recipe(**changes, train__use_cpu=True))
    got, want = (gradients(trainer_of(recipe)) for recipe in (on_gpu, on_cpu))
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert (got[name].cpu() - gradient).abs().max() <= 1e-3 * gradient.abs().max() + 1e-7, name


class Strict(TrainerCallback):
    """Lets the second step fail where anything waits for the GPU."""

    def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        torch.cuda.set_sync_debug_mode("error" if state.global_step == 1 else "default")


@pytest.mark.parametrize("kind", LOGITS)
def test_a_step_waits_for_nothing(write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kind: str):
    # What the student's own library asks in each forward pass: whether rows are packed.
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None, raising=False)
    recipe = load_recipe(write_recipe(targets__logits=LOGITS[kind], train__logging_steps=4))
    precompute(recipe, show_progress=False)
    trainer = trainer_of(recipe)
    trainer.add_callback(Strict())
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_threads_bring_the_batches_that_a_loader_does(write_recipe: Callable[..., Path]):
    batches = []
    for threads in (0, 3):
        recipe = load_recipe(write_recipe(train__dataloader_threads=threads))
        precompute(recipe, show_progress=False)
        trainer = trainer_of(recipe)
        loader = iter(trainer.get_train_dataloader())
        batches.append(trainer.get_batch_samples(loader, 4, trainer.args.device)[0])
    for by_loader, by_threads in zip(*batches, strict=True):
        assert by_threads["input_ids"].is_cuda
        assert by_loader.keys() == by_threads.keys()
        for name in ("input_ids", "labels", "counted"):
            assert torch.equal(by_loader[name], by_threads[name]), name
        for role, arrays in by_loader["logits"].items():
            assert all(torch.equal(values, by_threads["logits"][role][name]) for name, values in arrays.items()), role


@pytest.mark.parametrize("encoding", ["int8", "float16", "bfloat16", "coded"])
def test_a_state_that_a_gpu_encodes_is_within_its_stated_error(encoding: str):
    exact = torch.randn(512, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 2, 64)
    form, code = StateForm(encoding, 0.5 if encoding == "coded" else None), fit_code(exact)
    on_gpu = code.to(torch.device("cuda"))
    arrays = encode_state(exact.cuda(), form=form, code=on_gpu)
    back = decode_state(arrays, form=form, code=on_gpu).cpu()
    if encoding == "coded":
        assert ((back - exact) @ code.analysis_DD).abs().max() <= 0.25 * 1.01
    else:
        bound = stated_error(form, [{name: values.cpu() for name, values in arrays.items()}], exact)
        assert ((back - exact).abs() <= bound * 1.001 + 1e-5 * exact.abs() + 1e-6).all()


def test_two_runs_write_the_same_bytes(write_recipe: Callable[..., Path], workplace: Path):
    written = []
    for cache in ("first", "second"):
        recipe = load_recipe(write_recipe(cache=str(workplace / cache), targets__logits=LOGITS["final"]))
        store = open_store(precompute(recipe, show_progress=False).store)
        written.append({(record.shard, record.column.name): record.objects for record in Manifest(store).records()})
    assert written[0] == written[1]


def test_fp16_trains_with_its_scaler(write_recipe: Callable[..., Path]):
    recipe = load_recipe(write_recipe(train__fp16=True))
    precompute(recipe, show_progress=False)
    trainer = trainer_of(recipe)
    before = {name: value.detach().cpu().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    after = {name: value.detach().cpu() for name, value in trainer.model.named_parameters()}
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(after[name], before[name]) for name in before)
