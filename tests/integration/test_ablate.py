"""A sweep through the command line: interrupted, killed, continued, with a variant that cannot work."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from crash.signals import started
from forked import Forks
from typer.testing import Result

from coldstill.cache.processes import is_dead

DEADLINE_S = 300
IMPOSSIBLE = "projector.kind=none, loss.temperature=1"


@pytest.fixture
def sweep(write_recipe: Callable[..., Path], workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two by two grid points and two seeds of a narrow student: eight points, of which the temperature is idle.

    Four runs: one projector for each seed works, and one cannot.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    recipe = write_recipe(
        student={"path": str(workplace / "narrow")},
        mapping={"strategy": "uniform"},
        loss={"alpha": 0.5, "beta": 0, "gamma": 0.1},
        train={"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.001, "save_strategy": "no"},
    )
    grid = {"projector.kind": ["auto", "none"], "loss.temperature": [1, 2]}
    content = {"output": str(workplace / "sweep"), "recipe": recipe.name, "seeds": [1, 2], "grid": grid}
    path = workplace / "sweep.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def read_until(process: subprocess.Popen[str], said: str) -> list[str]:
    """Give what a sweep says, up to a line that holds some words."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line.rstrip())
        if said in line:
            return lines
    raise AssertionError(f"never said {said!r}: {lines}")


def wait_for_process(folder: Path) -> str:
    """Give the token of the process that works for a sweep, when there is one."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        token = json.loads((folder / "sweep.json").read_text())["process"]
        if token is not None:
            return str(token)
        time.sleep(0.02)
    raise AssertionError("no process began")


def statuses(folder: Path) -> list[str]:
    return [run["status"] for run in json.loads((folder / "sweep.json").read_text())["runs"].values()]


def contents(folder: Path, pattern: str) -> dict[str, tuple[bytes, int]]:
    """Give bytes and times of files, by which one sees that they were not written again."""
    files = sorted(file for file in folder.glob(pattern) if file.is_file())
    return {str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def test_a_sweep_that_was_interrupted_and_killed_continues_and_does_nothing_twice(
    forks: Forks, sweep: Path, workplace: Path, coldstill: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("coldstill.pipeline.runtime.program.PROGRAM", forks.program("coldstill.cli"))
    folder = workplace / "sweep"
    results = ("runs/*/train.json", "runs/*/student/*", "runs/*/evaluation/*")
    with started(forks, "ablate", str(sweep)) as process:
        said = read_until(process, "run 2 of 2: ")
        child = wait_for_process(folder)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        last = process.stderr.read()
        assert process.wait() == 130
    impossible = "failed: projector.kind is none, but the student's width 16 is not the teacher's 32; use auto"
    assert said[:2] == [f"coldstill: {IMPOSSIBLE}, seed {seed}: {impossible}" for seed in (1, 2)]
    assert "stage one for 2 runs" in said[2]
    assert "projector.kind=auto, loss.temperature=1, seed 1: perplexity" in said[4]
    assert "left" in said[4]
    assert last == "interrupted with 1 of 4 runs complete; run the same command again to go on\n"
    assert is_dead(child)
    assert statuses(folder) == ["complete", "pending", "failed", "failed"]
    first_run = [contents(folder, pattern) for pattern in results]
    store = contents(workplace / "caches", "stores/*/commits/**/*")
    assert len(first_run[0]) == 1

    with started(forks, "ablate", str(sweep)) as process:
        said = read_until(process, "run 1 of 1: ")
        child = wait_for_process(folder)
        assert not any(IMPOSSIBLE in line for line in said), "what failed is not tried again"
        (_, child_pid, *_) = child.split("-")
        os.kill(forks.pid_behind(process.pid), signal.SIGKILL)
        process.wait()
        # So that it is still at work when the next command looks for it. Not before: the kernel ends a process that is
        # stopped while its parent dies.
        os.kill(int(child_pid), signal.SIGSTOP)
        assert is_dead(child) is False, "what it began lives on"
    with started(forks, "ablate", str(sweep)) as process:
        said = read_until(process, f"waiting for process {child_pid}")
        os.kill(int(child_pid), signal.SIGCONT)
        shown, told = process.communicate()
        assert process.returncode == 1
    assert f"{IMPOSSIBLE}, seed 1" not in "".join(said) + told, "what failed is not tried again"
    assert statuses(folder) == ["complete", "complete", "failed", "failed"]
    for pattern, earlier in zip(results, first_run, strict=True):
        now = contents(folder, pattern)
        assert len(now) == 2 * len(earlier)
        assert {name: now[name] for name in earlier} == earlier, "the first run was run again"
    assert contents(workplace / "caches", "stores/*/commits/**/*") == store
    check_result(shown, folder)

    everything = contents(folder, "runs/**/*")
    third = coldstill("ablate", sweep, "--json", expect=1)
    assert third.stderr == "", "nothing was left to do"
    result = json.loads(third.stdout)
    assert result["precompute"]["teacher_was_loaded"] is False
    assert result["precompute"]["computed_tokens"] == result["precompute"]["num_tokens"], "each token once"
    assert contents(folder, "runs/**/*") == everything


def check_result(shown: str, folder: Path) -> None:
    """Check the table: what failed stands as failed, and points with one result share its run."""
    assert (
        "projector.kind=none, loss.temperature=2, seed 1, 2: failed: projector.kind is none, but the student's width 16"
        in shown
    )
    assert "teacher" in shown
    assert "±" in shown
    assert len(list((folder / "recipes").iterdir())) == 2, "the temperature makes no run of its own, what failed none"
    (log, _) = sorted((folder / "logs").iterdir())
    assert "projector.kind is none" in log.read_text()


def test_a_wrong_variant_ends_the_command_before_anything_runs(
    sweep: Path, workplace: Path, coldstill: Callable[..., Result]
):
    content = yaml.safe_load(sweep.read_text())
    content["variants"] = {"wrong": {"loss.gama": 1}}
    sweep.write_text(yaml.safe_dump(content, sort_keys=False))
    result = coldstill("ablate", sweep, expect=2)
    assert result.stderr == (
        "coldstill: unknown key 'loss.gama' in variant 'wrong, projector.kind=auto, loss.temperature=1' of "
        f"{sweep} over recipe.yaml; did you mean 'gamma'?\n"
    )
    assert not (workplace / "sweep").exists()
