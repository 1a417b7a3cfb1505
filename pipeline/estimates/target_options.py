"""The targets that a plan compares, each stored in a trial's store and measured: bytes on disk, and fidelity."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from coldstill.cache.manifest import Manifest
from coldstill.pipeline.estimates.budget import HiddenOption
from coldstill.pipeline.estimates.fidelity import Fidelity, FidelityJudge
from coldstill.pipeline.estimates.trial import Trial
from coldstill.pipeline.losses.logits_targets import FullDistribution
from coldstill.pipeline.models import load_model
from coldstill.pipeline.models.labels import counts_of
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.recipe.sections import LogitsTargetConfig, Recipe
from coldstill.pipeline.stage_one.capture import capture
from coldstill.pipeline.stage_two.target_sources import StoredTargets
from coldstill.pipeline.students.folders import find_student
from coldstill.pipeline.targets.captured import CaptureRequest
from coldstill.pipeline.targets.kinds import teacher_targets
from coldstill.pipeline.targets.logits_kinds import logits_targets
from coldstill.pipeline.targets.states import BlockOutput
from coldstill.pipeline.targets.wanted import block_output

_JUDGED_ROWS = 4
_CODED_STEPS = (0.02, 0.03, 0.05, 0.08)
_HIDDEN_STEPS = (0.1, 0.2, 0.4)
# What all options that are compared have alike.
_SHARED_KEYS = ("values", "temperatures")
# Of int8 as measured on the residual stream of a real model; docs/results.md.
_INT8_ERROR = 6e-5


@dataclass(frozen=True)
class KindPlan:
    """A kind of logits target.

    Attributes:
        setting: The overrides that choose it.
        is_chosen: Whether it is the recipe's own.
        bytes_per_token: On disk, with every normaliser that it stores.
        fidelity: At the recipe's temperature.
    """

    setting: str
    is_chosen: bool
    bytes_per_token: float
    fidelity: Fidelity


def measure_kinds(recipe: Recipe, trial: Trial, *, show_progress: bool) -> list[KindPlan]:
    """Store the recipe's kind of logits target and others for the trial's rows, and judge each by the student."""
    variants = trial.extend(_logits_sections(recipe), show_progress=show_progress)
    temperature = recipe.loss.temperature
    chosen = _setting(recipe.targets.logits.model_dump())
    judge = _judge(trial, temperature)
    manifest = Manifest(trial.run.store)
    shards = trial.run.selections["train"].shard_names
    plans = []
    for setting, variant in variants.items():
        source = StoredTargets.of_recipe(variant, trial.run, blocks=[], temperature=temperature)
        batch = source.first_rows("train", _JUDGED_ROWS, device=judge.device)
        stored = logits_targets(variant.targets.logits).stored(manifest, shards)
        num_bytes = sum(manifest.bytes_per_token(target.name, shards=shards) or 0.0 for target in stored)
        target = source.distribution(batch, temperature)
        plans.append(KindPlan(setting, setting == chosen, num_bytes, judge.judge(target)))
    return plans


def measure_hidden(recipe: Recipe, trial: Trial, *, show_progress: bool) -> list[HiddenOption]:
    """Store the recipe's blocks in several forms for the trial's rows; empty where it keeps none."""
    if recipe.targets.hidden.blocks == "none" or not recipe.loss.needs_hidden:
        return []
    sections: dict[str, dict[str, Any]] = {"targets.hidden.encoding=int8": {"encoding": "int8"}}
    for step in _HIDDEN_STEPS:
        sections[f"targets.hidden.encoding=coded targets.hidden.step={step:g}"] = {"encoding": "coded", "step": step}
    variants = trial.extend(
        {name: {"hidden": hidden} for name, hidden in sections.items()}, show_progress=show_progress
    )
    per_token = trial.bytes_per_token()
    options = []
    for setting, variant in variants.items():
        form = block_output(variant.targets.hidden, 0).form
        blocks = [target for target in teacher_targets(per_token) if isinstance(target, BlockOutput)]
        sizes = [per_token[target.name] for target in blocks if target.form == form]
        # Rounding to a step makes an error of a twelfth of its square in each coefficient, in units of the spread.
        error = _INT8_ERROR if form.step is None else form.step**2 / 12
        options.append(HiddenOption(setting, sum(sizes) / len(sizes), error, len(sizes)))
    return options


def _logits_sections(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return the targets sections to compare, by the overrides that choose each; the recipe's own among them."""
    own = recipe.targets.logits.model_dump()
    k = own["k"]
    temperatures = sorted({*own["temperatures"], recipe.loss.temperature})
    half = max(k // 2, 1)
    choices: list[dict[str, Any]] = [
        {"kind": "topk", "k": k},
        {"kind": "topk_sampled", "k": half, "samples": half},
        {"kind": "final", "encoding": "int8"},
        *({"kind": "final", "encoding": "coded", "step": step} for step in _CODED_STEPS),
    ]
    if own["kind"] != "none":
        choices.insert(0, {key: own[key] for key in own if key != "temperatures"})
    sections = [{**own, **choice, "temperatures": temperatures} for choice in choices]
    return {_setting(logits): {"logits": logits} for logits in sections}


def _setting(logits: Mapping[str, Any]) -> str:
    """Return the overrides that choose a kind, without the keys that it does not read."""
    keys = ["kind", *(key for key in LogitsTargetConfig(**logits).keys_in_use if key not in _SHARED_KEYS)]
    return " ".join(f"targets.logits.{key}={logits[key]}" for key in keys)


def _judge(trial: Trial, temperature: float) -> FidelityJudge:
    """Hold the trial's student, and the live teacher, over a few of its train rows."""
    teacher = Teacher.locate(trial.recipe.teacher)
    parts = teacher.parts
    batch = StoredTargets(trial.run).first_rows("train", _JUDGED_ROWS, device=teacher.device)
    ids_BT, counts_BT = batch["input_ids"], counts_of(batch)
    lengths = (
        batch["attention_mask"].sum(dim=1).tolist() if "attention_mask" in batch else [ids_BT.shape[1]] * len(ids_BT)
    )
    rows = [row[:length].cpu() for row, length in zip(ids_BT, lengths, strict=True)]
    names = [f"train row {index}" for index in range(len(rows))]
    state_ND = capture(parts, rows, CaptureRequest(final_state=True), row_names=names).final_state_ND
    assert state_ND is not None
    real_BT = batch.get("attention_mask", torch.ones_like(ids_BT)).bool()
    live = FullDistribution(state_ND[counts_BT[real_BT]].clone(), parts.output_head, temperature)
    student = load_model(find_student(trial.recipe), dtype="float32").to(teacher.device)
    given: list[str] = ["input_ids", "attention_mask"]
    inputs = {name: batch[name] for name in given if name in batch}
    return FidelityJudge(student, inputs, counts_BT, live)
