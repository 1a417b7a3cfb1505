"""Stage one on a device, for benchmarks/gpu.py: as fast as the teacher alone, the same bytes each time."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from coldstill.cache.manifest import Manifest
from coldstill.cache.store import open_store
from coldstill.pipeline.models.forward import pad_rows
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.outputs.run_index import find_run_rows
from coldstill.pipeline.precompute import precompute
from coldstill.pipeline.recipe.sections import Recipe, TeacherConfig
from coldstill.pipeline.stage_two.batches import BatchColumns, StoredRows

Figures = Iterator[tuple[str, Any]]


def store_of_two_runs(recipes: Sequence[Recipe], folder: Path) -> Figures:
    """Precompute twice, in the recipes' own store and in another, and say whether they are the same."""
    summary = precompute(*recipes, show_progress=False)
    yield "precompute_tokens_per_s", round(summary.computed_tokens / summary.seconds)
    yield "stored_bytes_per_token", round(summary.written_bytes / summary.computed_tokens)
    again = precompute(*(elsewhere(recipe, folder / "again") for recipe in recipes), show_progress=False)
    yield "same_bytes_from_two_runs", digests(summary.store) == digests(again.store)


def teacher_speeds(recipe: Recipe, device: torch.device, folder: Path) -> Figures:
    """Precompute beside the bare body of the teacher, and with the teacher streamed where that is known."""
    bare = body_tokens_per_s(recipe, device)
    yield "bare_body_tokens_per_s", round(bare)
    whole = precompute(elsewhere(recipe, folder / "alone"), show_progress=False)
    speed = whole.computed_tokens / whole.seconds
    yield "precompute_over_bare_body", round(speed / bare, 3)
    if "placement" not in TeacherConfig.model_fields:
        return
    section = recipe.teacher.model_copy(update={"placement": "streamed"})
    streaming = elsewhere(recipe, folder / "streamed").model_copy(update={"teacher": section})
    streamed = precompute(streaming, show_progress=False)
    yield "streamed_over_whole", round(streamed.computed_tokens / streamed.seconds / speed, 3)
    yield "streamed_gives_the_same_bytes", digests(streamed.store) == digests(whole.store)


@torch.inference_mode()
def body_tokens_per_s(recipe: Recipe, device: torch.device) -> float:
    """Run the teacher's body over the train rows twice, and time the second pass."""
    run = find_run_rows(recipe)
    stored = StoredRows(run.store.path, run.selections["train"], BatchColumns({}, {}))
    rows = [torch.from_numpy(row.arrays["tokens"]["ids"].astype("int64")) for row in stored]
    body, size = Teacher.locate(recipe.teacher).parts.body, recipe.teacher.batch_size
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        for start in range(0, len(rows), size):
            ids_BT, _ = pad_rows(rows[start : start + size], device=device)
            body(input_ids=ids_BT, use_cache=False)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return sum(map(len, rows)) / seconds


def elsewhere(recipe: Recipe, cache: Path) -> Recipe:
    return recipe.model_copy(update={"cache": str(cache)})


def digests(store: str) -> dict[tuple[str, str], Any]:
    """Return the sizes and digests of all that a store holds, by shard and column."""
    records = Manifest(open_store(store)).records()
    return {(record.shard, record.column.name): record.objects for record in records}
