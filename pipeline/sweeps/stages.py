"""The stages of a sweep: its checks, one pass of stage one for all runs, then training and judging run by run.

Each stage of a run is a process of its own. A run that fails is noted, and the next one begins.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from coldstill.cache.errors import ColdstillError
from coldstill.cache.identity import digest_of
from coldstill.pipeline.judging.results import read_results
from coldstill.pipeline.models.machine import check_device, machine_notes
from coldstill.pipeline.recipe.file import dump_recipe
from coldstill.pipeline.runtime.errors import RecipeError
from coldstill.pipeline.runtime.units import format_duration
from coldstill.pipeline.runtime.whole import write_whole
from coldstill.pipeline.stage_one.preflight import check_widths
from coldstill.pipeline.stage_one.requests import locate_teacher
from coldstill.pipeline.sweeps.processes import Outcome, run_command
from coldstill.pipeline.sweeps.results import measures_of
from coldstill.pipeline.sweeps.runs import Run, is_evaluated, is_trained
from coldstill.pipeline.sweeps.state import SweepState


def checked_runs(runs: Sequence[Run], state: SweepState, folder: Path, say: Callable[[str], None]) -> list[Run]:
    """Check runs before anything is spent, and return those that can be carried out.

    A mistake in one ends the sweep. That its projector cannot be is noted of a run instead: sweeps ask for that.

    Raises:
        ColdstillError: A recipe cannot be carried out on this machine; names the variant.
    """
    possible: list[Run] = []
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


def write_recipes(runs: Sequence[Run]) -> None:
    """Write the recipe of each run into its folder, from where its stages read it."""
    for run in runs:
        run.file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(run.file, dump_recipe(run.recipe))


def precompute_runs(runs: Sequence[Run], state: SweepState, folder: Path, say: Callable[[str], None]) -> None:
    """Run stage one for all runs in one pass, or one after another where it refuses one of them.

    Raises:
        RecipeError: It fails for all.
    """
    say(f"stage one for {len(runs)} run{'s'[: len(runs) != 1]}")
    outcome = _stage_one(runs, state)
    if outcome.error is None:
        return
    groups: dict[str, list[Run]] = {}
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


def _stage_one(runs: Sequence[Run], state: SweepState) -> Outcome:
    outcome = run_command("precompute", *(str(run.file) for run in runs), on_start=state.note_process)
    state.note_process(None)
    if outcome.summary is not None:
        state.note_precompute(outcome.summary, [run.key for run in runs])
    return outcome


def train_and_evaluate_runs(runs: Sequence[Run], state: SweepState, folder: Path, say: Callable[[str], None]) -> None:
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


def _train_and_evaluate(run: Run, state: SweepState) -> Outcome | None:
    """Do what a run lacks, and return how it failed; None where it did not."""
    for command, is_done in (("train", is_trained), ("evaluate", is_evaluated)):
        if is_done(run.recipe):
            continue
        outcome = run_command(command, str(run.file), on_start=state.note_process)
        state.note_process(None)
        if outcome.error is not None:
            return outcome
    return None


def _note_failure(run: Run, failure: Outcome, state: SweepState, folder: Path) -> None:
    log = folder / "logs" / f"{run.key}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("\n".join(failure.last_lines) + "\n")
    state.note(run.key, "failed", failure.error)


def _headline(run: Run) -> str:
    recovered = measures_of(read_results(Path(run.recipe.output)) or {}, "recovered")
    return f"perplexity {recovered['perplexity']:.2f}, KL {recovered['kl']:.4f}, agreement {recovered['agreement']:.1%}"
