"""The demo's promise, from nothing to the table, twice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
def test_the_demo_recovers_its_student_and_a_second_run_loads_no_teacher(coldstill: Callable[..., Any], tmp_path: Path):
    first = json.loads(coldstill("demo", "--folder", tmp_path / "demo", "--json").stdout)
    models = first["evaluation"]["models"]
    assert models["recovered"]["kl"] <= 0.5 * models["pruned"]["kl"]
    assert first["evaluation"]["gap_closed"]["perplexity"] >= 0.8
    second = json.loads(coldstill("demo", "--folder", tmp_path / "demo", "--json").stdout)
    assert second["computed_tokens"] == 0
    assert second["evaluation"] == first["evaluation"]
