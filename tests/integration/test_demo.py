"""The demo's promise, from nothing to the table, twice; its teacher's training goes on where it was cut off."""

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
from crash.signals import last_line, started
from forked import Forks


@pytest.mark.slow
def test_the_demo_recovers_its_student_and_a_second_run_loads_no_teacher(coldstill: Callable[..., Any], tmp_path: Path):
    first = json.loads(coldstill("demo", "--folder", tmp_path / "demo", "--json").stdout)
    models = first["evaluation"]["models"]
    assert models["recovered"]["kl"] <= 0.5 * models["pruned"]["kl"]
    assert first["evaluation"]["gap_closed"]["perplexity"] >= 0.8
    second = json.loads(coldstill("demo", "--folder", tmp_path / "demo", "--json").stdout)
    assert second["computed_tokens"] == 0
    assert second["evaluation"] == first["evaluation"]


@pytest.mark.slow
def test_the_demos_teacher_goes_on_where_its_training_was_interrupted(forks: Forks, tmp_path: Path):
    saved = []
    for least in (30, 0):
        with started(forks, "demo", "--folder", str(tmp_path / "demo")) as child:
            assert child.stderr is not None
            _read_until_step(child.stderr, least)
            child.send_signal(signal.SIGINT)
            _, stderr = child.communicate(timeout=120)
        assert child.returncode == 130, stderr
        said = re.fullmatch(
            r"interrupted at step (\d+), which is saved; run the same command again to go on", last_line(stderr)
        )
        assert said, last_line(stderr)
        saved.append(int(said[1]))
    assert 30 <= saved[0] < saved[1] < saved[0] + 30
    assert not (tmp_path / "demo/teacher").exists()


def _read_until_step(stream: IO[str], least: int) -> None:
    """Read a progress bar up to some step of the 1600."""
    heard = ""
    while not ((found := re.search(r"(\d+)/1600 \[$", heard)) and int(found[1]) >= least):
        letter = stream.read(1)
        assert letter, f"never came to step {least}: {heard}"
        heard += letter
