"""What each command says when it is interrupted is true of what it had done."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

FROM_PRETRAINED = AutoModelForCausalLM.from_pretrained


@pytest.fixture
def interrupted_at_load(coldstill: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a command that somebody interrupts while it loads its nth model, and give the last line that it says."""

    def run(*arguments: Any, number: int = 1) -> str:
        loads = 0

        def load(*args: Any, **kwargs: Any) -> Any:
            nonlocal loads
            loads += 1
            if loads == number:
                raise KeyboardInterrupt
            return FROM_PRETRAINED(*args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(AutoModelForCausalLM, "from_pretrained", load)
            said = coldstill(*arguments, expect=130).stderr
        return [line for line in said.splitlines() if line.strip()][-1]

    return run


def test_an_interrupted_command_says_what_stays_and_no_more(
    interrupted_at_load: Callable[..., str],
    coldstill: Callable[..., Any],
    write_recipe: Callable[..., Path],
    workplace: Path,
):
    recipe = write_recipe(student={"path": str(workplace / "narrow")}, mapping={"strategy": "uniform"})
    first_shard = "interrupted before the first of 2 shards was complete; the same command begins with it"
    assert interrupted_at_load("precompute", recipe) == first_shard
    assert interrupted_at_load("plan", recipe) == "interrupted with nothing kept, as a plan keeps nothing"
    coldstill("precompute", recipe)
    none = "interrupted before a student was judged; the same command begins anew"
    assert interrupted_at_load("evaluate", recipe) == none
    none = "interrupted before a step was taken, with none saved; the same command begins anew"
    assert interrupted_at_load("train", recipe) == none
    coldstill("train", recipe)
    judged = "with pruned judged on the eval rows; run the same command again to go on"
    assert interrupted_at_load("evaluate", recipe, number=2) == f"interrupted {judged}"


def test_an_interrupted_prune_begins_anew(interrupted_at_load: Callable[..., str], write_recipe: Callable[..., Path]):
    said = interrupted_at_load("prune", write_recipe())
    assert said == "interrupted before the student was made; the same command begins anew"
