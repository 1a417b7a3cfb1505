"""What becomes of errors while a trainer is made: the recipe's own, the machine's, and what nobody foresaw."""

import importlib

import pytest
import torch
import typer

from coldstill.pipeline.runtime.endings import one_line_errors
from coldstill.pipeline.runtime.errors import ModelError, RecipeError
from coldstill.pipeline.stage_two.setup import as_error_of_train


def test_no_memory_while_the_trainer_is_made_is_told_as_such(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(typer.Exit), one_line_errors(), as_error_of_train():
        torch.nn.Linear(10**8, 10**8)
    line = capsys.readouterr().err
    assert line.startswith("coldstill: this machine is out of memory: 40,000.0 TB could not be allocated; take smaller")


def test_a_gpus_own_error_passes_as_it_is():
    with pytest.raises(torch.OutOfMemoryError), as_error_of_train():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_what_is_broken_is_no_mistake_in_the_recipe():
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"), as_error_of_train():
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_what_is_not_installed_and_what_does_not_go_together_is_the_recipes():
    with pytest.raises(RecipeError, match="^train: No module named 'no_such_package'$"), as_error_of_train():
        importlib.import_module("no_such_package")
    with pytest.raises(RecipeError, match="^train: --half .* FSDP$"), as_error_of_train():
        raise ValueError("--half precision\n  does not go with FSDP")


def test_an_error_of_this_projects_own_stays_what_it_is():
    with pytest.raises(ModelError, match="^another vocabulary$"), as_error_of_train():
        raise ModelError("another vocabulary")
