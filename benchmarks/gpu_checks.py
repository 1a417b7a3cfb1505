"""What is right or wrong on a device, and how fast rows are read for it: for benchmarks/gpu.py."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from gpu_steps import forget, trainer_of
from torch import Tensor

from coldstill.pipeline.outputs.run_index import find_run_rows
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.stage_two.setup import create_trainer
from coldstill.pipeline.students.folders import find_student
from coldstill.pipeline.targets.encodings import StateForm, decode_state, encode_state, stated_error
from coldstill.pipeline.targets.token_encodings import LOGIT_STEP, decode_topk, encode_topk, topk_column
from coldstill.pipeline.targets.transform_coding import fit_code

Figures = Iterator[tuple[str, Any]]

POSITIONS, WIDTH, VOCABULARY, K = 2_048, 576, 49_152, 64
THREADS = (1, 2, 4, 8)
STEPS = 3


def states() -> Tensor:
    """Make states as a teacher has them: channels of very different scales, and one huge position."""
    generator = torch.Generator().manual_seed(0)
    values_ND = torch.randn(POSITIONS, WIDTH, generator=generator) * torch.logspace(-1, 2, WIDTH)
    values_ND[0, :4] = 20_000.0
    return values_ND


def encoder_errors(device: torch.device) -> Figures:
    """Encode and decode on the device, and give the largest error over the stated one; and the share of equal bytes."""
    exact = states()
    code = fit_code(exact)
    for form in (StateForm("int8"), StateForm("float16"), StateForm("bfloat16"), StateForm("coded", 0.5)):
        of_form = code if form.encoding == "coded" else None
        here = encode_state(exact, form=form, code=of_form)
        there = encode_state(exact.to(device), form=form, code=None if of_form is None else of_form.to(device))
        back = decode_state(there, form=form, code=None if of_form is None else of_form.to(device)).cpu()
        if of_form is None:
            bound = stated_error(form, [{name: values.cpu() for name, values in there.items()}], exact)
            error = ((back - exact).abs() / (bound * 1.001 + 1e-5 * exact.abs() + 1e-6)).max()
        else:
            # Half a step in each coefficient, and what float32 rounding does to the largest.
            coefficients = (back - exact) @ code.analysis_DD
            error = (coefficients.abs() / (0.5 * 0.5 + 1e-5 * (exact @ code.analysis_DD).abs().amax())).max()
        equal = [float((there[name].cpu() == here[name]).float().mean()) for name in here]
        yield f"encoder.{form}.error_over_stated", round(float(error), 4)
        yield f"encoder.{form}.least_share_of_equal_values", round(min(equal), 6)
    yield from topk_errors(device)


def topk_errors(device: torch.device) -> Figures:
    logits = torch.randn(256, VOCABULARY, generator=torch.Generator().manual_seed(1)).to(device) * 4
    top = logits.topk(K)
    column = topk_column("logits/topk/64/delta", k=K, values="delta", vocab_size=VOCABULARY)
    values, ids = decode_topk(encode_topk(top.values, top.indices, column=column), k=K)
    yield "encoder.topk.error_over_stated", round(float((values - top.values).abs().max()) / (LOGIT_STEP / 2 + 1e-5), 4)
    yield "encoder.topk.ids_are_equal", bool((ids == top.indices).all())


def reader_speeds(recipe: Recipe) -> Figures:
    """Read the train rows, laid side by side, by one thread and by several that share a reader."""
    trainer = create_trainer(recipe, find_run_rows(recipe), find_student(recipe))
    rows, collate = trainer.train_dataset, trainer.data_collator
    size, num_tokens = trainer.args.per_device_train_batch_size, len(rows) * recipe.data.sequence_length
    batches = [list(range(start, min(start + size, len(rows)))) for start in range(0, len(rows), size)]
    speeds = {}
    for number in THREADS:
        with ThreadPoolExecutor(number) as pool:
            started = time.perf_counter()
            for _ in pool.map(lambda indices: collate(rows.__getitems__(indices)), batches):
                pass
            speeds[number] = round(num_tokens / (time.perf_counter() - started))
    forget(trainer)
    yield "reader_tokens_per_s", speeds


def half_precision_losses(recipe: Recipe, device: torch.device) -> Figures:
    """Train a few steps in fp16, whose gradients are scaled: the losses are finite, and weights move."""
    if device.type != "cuda":
        yield "fp16", "not without a GPU"
        return
    trainer = trainer_of("topk", {"topk": recipe}, "fp16", STEPS)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.args.logging_steps = 1
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    moved = sum(
        not torch.equal(value.detach().cpu(), before[name].cpu()) for name, value in trainer.model.named_parameters()
    )
    forget(trainer)
    yield "fp16.losses", losses
    yield "fp16.share_of_weights_that_moved", round(moved / len(before), 3)
