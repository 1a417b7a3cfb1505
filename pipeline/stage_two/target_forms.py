"""From a recipe and a store to how the stored targets of a batch are read."""

from typing import Any

import torch
from accelerate.utils import send_to_device
from coldstill.cache.columns import Axis
from coldstill.cache.manifest import Manifest
from coldstill.cache.reader import require_complete
from coldstill.cache.selections import Selection
from coldstill.cache.store import Store
from coldstill.pipeline.losses.hidden_terms import HiddenForm
from coldstill.pipeline.losses.logits_targets import (
    FINAL,
    NORMALISER,
    TAIL,
    TOPK,
    BucketedForm,
    FinalForm,
    LogitsForm,
    LogitsTarget,
    SampledForm,
)
from coldstill.pipeline.models.labels import counts_of
from coldstill.pipeline.outputs.run_index import RunRows
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.stage_two.batches import BatchCollator, BatchColumns, StoredRows
from coldstill.pipeline.stage_two.distiller import TargetForms
from coldstill.pipeline.targets.calibrations import read_codes
from coldstill.pipeline.targets.columns import TargetColumns, columns_of, final_form, hidden_form, logsumexp_name
from coldstill.pipeline.targets.stored_head import load_head
from coldstill.pipeline.targets.transform_coding import TransformCode, logit_correction

_HOST = torch.device("cpu")


def logits_columns(wanted: TargetColumns, temperature: float) -> dict[str, str]:
    """Give the columns that the logits target reads at a temperature, by role."""
    if wanted.final:
        return {FINAL: wanted.final}
    named = {TOPK: wanted.topk, TAIL: wanted.tail, NORMALISER: logsumexp_name(temperature)}
    return {role: name for role, name in named.items() if name}


def column_axes(manifest: Manifest, columns: BatchColumns, shard: str) -> dict[str, dict[str, Axis]]:
    """Read the axis of each array off one committed shard; it is the same in all."""
    records = {name: manifest.record(shard, name) for name in columns.names()}
    return {
        name: {array: spec.axis for array, spec in record.column.arrays.items()} for name, record in records.items()
    }


def read_batch(
    recipe: Recipe,
    run: RunRows,
    *,
    split: str,
    num_rows: int,
    temperature: float | None = None,
    device: torch.device = _HOST,
) -> dict[str, Any]:
    """Read the first rows of a split as a training batch has them, with the columns of the logits at a temperature.

    Raises:
        IncompleteError: The columns are not there for all rows of the split.
    """
    selection, manifest = run.selections[split], Manifest(run.store)
    columns = BatchColumns(_columns_at(recipe, manifest, selection, split, temperature), hidden={})
    require_complete(manifest, selection, columns.names(), store=run.store.path)
    rows = StoredRows(run.store.path, selection, columns)
    collate = BatchCollator(columns, column_axes(manifest, columns, selection.shard_names[0]))
    batch: dict[str, Any] = collate(rows.__getitems__(range(min(num_rows, len(rows)))))
    return {key: send_to_device(values, device) for key, values in batch.items()}


def read_logits(
    recipe: Recipe, run: RunRows, *, split: str, num_rows: int, temperature: float, device: torch.device = _HOST
) -> LogitsTarget:
    """Read the teacher's distribution at the positions that count of a split's first rows, at a temperature."""
    batch = read_batch(recipe, run, split=split, num_rows=num_rows, temperature=temperature, device=device)
    manifest = Manifest(run.store)
    columns = BatchColumns(_columns_at(recipe, manifest, run.selections[split], split, temperature), hidden={})
    logits = target_forms(recipe, run.store, columns).logits
    assert logits is not None
    with torch.no_grad():
        return logits.read(batch["logits"], counts_of(batch), temperature)


def _columns_at(
    recipe: Recipe, manifest: Manifest, selection: Selection, split: str, temperature: float | None
) -> dict[str, str]:
    if temperature is None:
        return {}
    wanted = columns_of(recipe.targets, blocks=[], split=split, manifest=manifest, shards=selection.shard_names)
    return logits_columns(wanted, temperature)


def target_forms(recipe: Recipe, store: Store, columns: BatchColumns) -> TargetForms:
    """Say how a batch of these columns is read, with what the store holds for them once.

    Raises:
        StoreError: A calibration or the output head is missing, or another one.
    """
    names = [*columns.logits.values(), *columns.hidden.values()]
    codes = read_codes(store, Manifest(store), names)
    hidden_codes = {block: codes[name] for block, name in columns.hidden.items() if name in codes}
    logits = None
    if columns.logits:
        logits = _logits_form(recipe, store, codes.get(columns.logits.get(FINAL, "")))
    hidden = HiddenForm(hidden_form(recipe.targets.hidden), hidden_codes) if columns.hidden else None
    return TargetForms(logits, hidden)


def _logits_form(recipe: Recipe, store: Store, code: TransformCode | None) -> LogitsForm:
    logits = recipe.targets.logits
    if logits.kind == "topk":
        return BucketedForm(logits.k, int(store.teacher["vocab_size"]))
    if logits.kind == "topk_sampled":
        return SampledForm(logits.k)
    form, head = final_form(logits), load_head(store, _HOST)
    correction_V = None if code is None or form.step is None else logit_correction(head, code, form.step)
    return FinalForm(form, head, code, correction_V)
