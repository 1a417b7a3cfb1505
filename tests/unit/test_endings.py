"""What a command's end says of errors that are not Coldstill's own."""

import pytest
import torch
import typer

from pipeline.endings import one_line_errors


def test_an_accelerator_without_memory_is_one_line_that_says_what_to_make_smaller(capsys: pytest.CaptureFixture[str]):
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which ..."
    with pytest.raises(typer.Exit) as raised, one_line_errors():
        raise torch.OutOfMemoryError(said)
    assert raised.value.exit_code == 2
    line = capsys.readouterr().err
    assert line.startswith("coldstill: CUDA out of memory; take smaller batches (teacher.batch_size, train.per_device")
    assert line.count("\n") == 1


def test_what_nobody_foresaw_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="^shapes"), one_line_errors():
        raise RuntimeError("shapes do not fit")
