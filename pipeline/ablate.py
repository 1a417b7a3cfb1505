"""Carry out a sweep: the teacher's work once, then every run that is not complete, each in processes of its own.

Runs go seed by seed, so that a sweep that is interrupted has compared its variants. A run that fails is noted and the
next one begins; what is complete is never run again.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from coldstill.cache.errors import ColdstillError, StoreError
from coldstill.cache.identity import digest_of
from coldstill.pipeline.judging.results import EVALUATION, read_evaluation, read_results
from coldstill.pipeline.models.machine import check_device, machine_notes
from coldstill.pipeline.outputs.places import check_writable
from coldstill.pipeline.outputs.provenance import PROVENANCE_FILE, RECIPE_FILE
from coldstill.pipeline.outputs.run_index import find_run_rows
from coldstill.pipeline.recipe.file import dump_recipe, load_recipe
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.runtime.errors import RecipeError
from coldstill.pipeline.runtime.interruptions import what_stays
from coldstill.pipeline.runtime.units import format_duration
from coldstill.pipeline.runtime.whole import write_whole
from coldstill.pipeline.stage_one.preflight import check_widths
from coldstill.pipeline.stage_one.requests import locate_teacher
from coldstill.pipeline.stage_two.run_folder import (
    check_claim,
    claimed_run,
    decisive_sections,
    finished_summary,
    run_key,
)
from coldstill.pipeline.sweeps.file import Sweep, load_sweep
from coldstill.pipeline.sweeps.keys import canonical, sweep_key
from coldstill.pipeline.sweeps.processes import Outcome, run_command
from coldstill.pipeline.sweeps.results import SweepResult, measures_of, output_of, read_state, read_sweep
from coldstill.pipeline.sweeps.state import SweepState, hold_sweep

# Of `evaluate`, what changes nothing but how fast models are judged.
_IDLE_EVALUATE_KEYS = {"batch_size", "device"}


@dataclass(frozen=True)
class _Run:
    """A run to carry out.

    Attributes:
        key: Its name.
        title: The first variant and seed that it is of.
        recipe: Resolved, with its own output.
        file: Where its recipe is.
    """

    key: str
    title: str
    recipe: Recipe
    file: Path


def ablate(
    path: Path, overrides: Sequence[str] = (), *, retry: bool = False, say: Callable[[str], None] = lambda _line: None
) -> SweepResult:
    """Run what is missing of a sweep, and give what all of it found.

    Args:
        path: The sweep file.
        overrides: Changes to its base recipe.
        retry: Whether to run again what failed.
        say: Called with a line about each run.

    Raises:
        RecipeError: The sweep or one of its recipes is wrong, or stage one fails for all of them; nothing was trained.
        ModelError: Its teacher or a student is wrong; nothing was run.
        InUseError: Another process carries the sweep out.
    """
    sweep = load_sweep(path, overrides)
    check_writable("output", sweep.output)
    keys = {
        (variant.name, seed): sweep_key(recipe)
        for variant in sweep.variants
        for seed, recipe in variant.recipes.items()
    }
    runs = _plan(sweep, keys)
    with what_stays(lambda: _what_stays(sweep.output, runs)), hold_sweep(sweep.output):
        state = SweepState(sweep, keys)
        state.wait_for_orphan(say)
        wanted = _checked([run for run in runs if _is_wanted(run, state, retry=retry)], state, sweep.output, say)
        if wanted:
            _precompute(wanted, state, sweep.output, say)
        _carry_out([run for run in wanted if state.status(run.key) != "failed"], state, sweep.output, say)
    return read_sweep(sweep.output)


def _what_stays(folder: Path, runs: Sequence[_Run]) -> str:
    states = (read_state(folder) or {"runs": {}})["runs"]
    complete = sum(states.get(run.key, {}).get("status") == "complete" for run in runs)
    return f"with {complete} of {len(runs)} runs complete; run the same command again to go on"


def _plan(sweep: Sweep, keys: Mapping[tuple[str, int], str]) -> list[_Run]:
    """List the distinct runs of a sweep, seed by seed."""
    runs: dict[str, _Run] = {}
    seeds = dict.fromkeys(seed for variant in sweep.variants for seed in variant.recipes)
    for seed in seeds:
        for variant in sweep.variants:
            key = keys[variant.name, seed]
            if key not in runs:
                output = output_of(sweep.output, key)
                recipe = canonical(variant.recipes[seed]).model_copy(update={"output": str(output)})
                title = f"{variant.name}, seed {seed}"
                runs[key] = _Run(key, title, recipe, sweep.output / "recipes" / f"{key}.yaml")
    return list(runs.values())


def _is_wanted(run: _Run, state: SweepState, *, retry: bool) -> bool:
    """Note how a run stands, and say whether it is to be carried out."""
    if is_trained(run.recipe) and is_evaluated(run.recipe):
        state.note(run.key, "complete")
    elif retry or state.status(run.key) != "failed":
        state.note(run.key, "pending")
    return state.status(run.key) == "pending"


def _checked(runs: Sequence[_Run], state: SweepState, folder: Path, say: Callable[[str], None]) -> list[_Run]:
    """Check runs before anything is spent, and give those that can be carried out.

    A mistake in one ends the sweep. That its projector cannot be is noted of a run instead: sweeps ask for that.

    Raises:
        ColdstillError: A recipe cannot be carried out on this machine; names the variant.
    """
    possible: list[_Run] = []
    notes: dict[str, None] = {}
    for run in runs:
        projector = run.recipe.projector.model_copy(update={"kind": "auto"})
        try:
            teacher = locate_teacher([run.recipe.model_copy(update={"projector": projector})], trains_here=True)
            check_device("evaluate.device", run.recipe.evaluate.device)
        except ColdstillError as error:
            raise type(error)(f"{run.title}: {error}") from None
        try:
            check_widths(run.recipe, teacher)
        except RecipeError as error:
            _note_failure(run, Outcome(None, str(error), True, [str(error)]), state, folder)
            say(f"{run.title}: failed: {error}")
            continue
        possible.append(run)
        notes |= dict.fromkeys(machine_notes(run.recipe, "plan"))
    for note in notes:
        say(note)
    return possible


def _precompute(runs: Sequence[_Run], state: SweepState, folder: Path, say: Callable[[str], None]) -> None:
    """Run stage one for all runs in one pass, or one after another where it refuses one of them.

    Raises:
        RecipeError: It fails for all.
    """
    for run in runs:
        run.file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(run.file, dump_recipe(run.recipe))
    say(f"stage one for {len(runs)} run{'s'[: len(runs) != 1]}")
    outcome = _stage_one(runs, state)
    if outcome.error is None:
        return
    groups: dict[str, list[_Run]] = {}
    for run in runs:
        of_stage_one = run.recipe.model_dump(mode="json", include={"data", "student", "targets", "mapping"})
        groups.setdefault(digest_of(of_stage_one), []).append(run)
    if not outcome.is_refusal or len(groups) == 1:
        raise RecipeError(f"stage one of {folder}: {outcome.error}")
    failures = {}
    for key, group in groups.items():
        outcome = _stage_one(group, state)
        if outcome.error is not None:
            failures[key] = outcome
    if len(failures) == len(groups) and len({failure.error for failure in failures.values()}) == 1:
        raise RecipeError(f"stage one of {folder}: {outcome.error}")
    for key, failure in failures.items():
        for run in groups[key]:
            _note_failure(run, failure, state, folder)
            say(f"{run.title}: failed: {failure.error}")


def _stage_one(runs: Sequence[_Run], state: SweepState) -> Outcome:
    outcome = run_command("precompute", *(str(run.file) for run in runs), on_start=state.note_process)
    state.note_process(None)
    if outcome.summary is not None:
        state.note_precompute(outcome.summary, [run.key for run in runs])
    return outcome


def _carry_out(runs: Sequence[_Run], state: SweepState, folder: Path, say: Callable[[str], None]) -> None:
    """Train and evaluate runs one after another."""
    started = time.monotonic()
    for number, run in enumerate(runs, start=1):
        begun = time.monotonic()
        say(f"run {number} of {len(runs)}: {run.title}")
        failure = _train_and_evaluate(run, state)
        if failure is None:
            state.note(run.key, "complete")
            found = _headline(run)
        else:
            _note_failure(run, failure, state, folder)
            found = f"failed: {failure.error}"
        now = time.monotonic()
        left = (now - started) / number * (len(runs) - number)
        about = f"; about {format_duration(left)} left" if number < len(runs) else ""
        say(f"run {number} of {len(runs)}: {run.title}: {found}; {format_duration(now - begun)}{about}")


def _train_and_evaluate(run: _Run, state: SweepState) -> Outcome | None:
    """Do what a run lacks, and give how it failed; None where it did not."""
    for command, is_done in (("train", is_trained), ("evaluate", is_evaluated)):
        if is_done(run.recipe):
            continue
        outcome = run_command(command, str(run.file), on_start=state.note_process)
        state.note_process(None)
        if outcome.error is not None:
            return outcome
    return None


def _note_failure(run: _Run, failure: Outcome, state: SweepState, folder: Path) -> None:
    log = folder / "logs" / f"{run.key}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("\n".join(failure.last_lines) + "\n")
    state.note(run.key, "failed", failure.error)


def _headline(run: _Run) -> str:
    recovered = measures_of(read_results(Path(run.recipe.output)) or {}, "recovered")
    return f"perplexity {recovered['perplexity']:.2f}, KL {recovered['kl']:.4f}, agreement {recovered['agreement']:.1%}"


def is_trained(recipe: Recipe) -> bool:
    """Whether the recipe's output holds its complete run; where the store is gone, by what decides it of the recipe."""
    if finished_summary(recipe) is None:
        return False
    key = decisive_sections(recipe)
    with suppress(StoreError):
        key = run_key(recipe, find_run_rows(recipe))
    try:
        check_claim(recipe, key)
    except RecipeError:
        return False
    return True


def is_evaluated(recipe: Recipe) -> bool:
    """Whether the recipe's output holds a judgement of its trained student, on its rows, as the recipe asks for it."""
    folder = Path(recipe.output) / EVALUATION
    try:
        if read_evaluation(recipe) is None:
            return False
        record = json.loads((folder / PROVENANCE_FILE).read_text())
        judged_by = load_recipe(folder / RECIPE_FILE)
    except ColdstillError:
        return False
    claimed = claimed_run(recipe)
    return (
        claimed is not None
        and record["store"] == claimed["store"]
        and record["selection"] == claimed["selections"]["eval"]
        and judged_by.evaluate.model_dump(exclude=_IDLE_EVALUATE_KEYS)
        == recipe.evaluate.model_dump(exclude=_IDLE_EVALUATE_KEYS)
    )
