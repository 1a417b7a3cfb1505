"""Carry out a sweep: the teacher's work once, then every run that is not complete, each in processes of its own.

Runs go seed by seed, so that a sweep that is interrupted has compared its variants. A run that fails is noted and the
next one begins; what is complete is never run again.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from coldstill.pipeline.outputs.places import check_writable
from coldstill.pipeline.runtime.interruptions import what_stays
from coldstill.pipeline.sweeps.file import load_sweep
from coldstill.pipeline.sweeps.keys import sweep_key
from coldstill.pipeline.sweeps.results import SweepResult, read_state, read_sweep
from coldstill.pipeline.sweeps.runs import Run, is_wanted, plan_runs
from coldstill.pipeline.sweeps.stages import checked_runs, precompute_runs, train_and_evaluate_runs, write_recipes
from coldstill.pipeline.sweeps.state import SweepState, hold_sweep


def ablate(
    path: Path, overrides: Sequence[str] = (), *, retry: bool = False, say: Callable[[str], None] = lambda _line: None
) -> SweepResult:
    """Run what is missing of a sweep, and return what all of it found.

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
    runs = plan_runs(sweep, keys)
    with what_stays(lambda: _what_stays(sweep.output, runs)), hold_sweep(sweep.output):
        state = SweepState(sweep, keys)
        state.wait_for_orphan(say)
        wanted = checked_runs([run for run in runs if is_wanted(run, state, retry=retry)], state, sweep.output, say)
        write_recipes(wanted)
        # A teacher that speaks as training goes has no stage one.
        if stored := [run for run in wanted if not run.recipe.targets.is_live]:
            precompute_runs(stored, state, sweep.output, say)
        train_and_evaluate_runs([run for run in wanted if state.status(run.key) != "failed"], state, sweep.output, say)
    return read_sweep(sweep.output)


def _what_stays(folder: Path, runs: Sequence[Run]) -> str:
    states = (read_state(folder) or {"runs": {}})["runs"]
    complete = sum(states.get(run.key, {}).get("status") == "complete" for run in runs)
    return f"with {complete} of {len(runs)} runs complete; run the same command again to go on"
