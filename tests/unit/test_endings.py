"""How commands end: by errors that are not Coldstill's own, and by signals."""

import signal
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import typer

from coldstill.pipeline.runtime.endings import one_line_errors
from coldstill.pipeline.runtime.errors import RecipeError
from coldstill.pipeline.runtime.interruptions import signals_wait, what_stays


@pytest.fixture(autouse=True)
def signals_that_are_handled() -> Iterator[None]:
    """What a shell starts in the background ignores Ctrl-C, and so would these tests: here it is handled as usual."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def said_by(work: Callable[[], None], capsys: pytest.CaptureFixture[str], *, exit_code: int) -> str:
    """Give the line that a command ends with."""
    with pytest.raises(typer.Exit) as raised, one_line_errors():
        work()
    assert raised.value.exit_code == exit_code
    return capsys.readouterr().err


def test_an_accelerator_without_memory_is_one_line_that_says_what_to_make_smaller(capsys: pytest.CaptureFixture[str]):
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which ..."
    with pytest.raises(typer.Exit) as raised, one_line_errors():
        raise torch.OutOfMemoryError(said)
    assert raised.value.exit_code == 2
    line = capsys.readouterr().err
    assert line.startswith("coldstill: CUDA out of memory; take smaller batches (teacher.batch_size, train.per_device")
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("allocate", "said"),
    [
        pytest.param(
            lambda: torch.empty(10**15), ": 4,000.0 TB could not be allocated; take smaller batches", id="torch"
        ),
        pytest.param(lambda: np.empty(10**15), ": Unable to allocate 7.11 PiB for an array", id="numpy"),
        pytest.param(lambda: bytearray(2**62), "; take smaller batches (teacher.batch_size, ", id="Python"),
    ],
)
def test_a_machine_without_memory_is_one_line_that_offers_no_cpu(
    capsys: pytest.CaptureFixture[str], allocate: Callable[[], object], said: str
):
    line = said_by(allocate, capsys, exit_code=2)
    assert line.startswith(f"coldstill: this machine is out of memory{said}")
    assert line.endswith("evaluate.batch_size)\n")
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call.",
        "MPS backend out of memory (MPS allocated: 9.05 GB, max allowed: 9.07 GB). Tried to allocate 256 bytes.",
    ],
)
def test_a_device_that_says_it_by_a_plain_error_is_out_of_memory_too(capsys: pytest.CaptureFixture[str], said: str):
    def fill() -> None:
        raise RuntimeError(said)

    line = said_by(fill, capsys, exit_code=2)
    assert "out of memory" in line
    assert line.endswith(", or cpu as teacher.device or evaluate.device\n")
    assert line.count("\n") == 1


def test_what_nobody_foresaw_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="^shapes"), one_line_errors():
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_promises_nothing_that_the_work_did_not_say(
    capsys: pytest.CaptureFixture[str], number: signal.Signals, exit_code: int
):
    def told() -> None:
        with what_stays(lambda: "in a trial, with nothing kept"), what_stays(lambda: "with 3 of 8 shards complete"):
            signal.raise_signal(number)

    untold = said_by(lambda: signal.raise_signal(number), capsys, exit_code=exit_code)
    assert untold == "interrupted\n"
    assert said_by(told, capsys, exit_code=exit_code) == "interrupted in a trial, with nothing kept\n"


def test_a_full_disk_promises_nothing_that_the_work_did_not_say(capsys: pytest.CaptureFixture[str]):
    def full() -> None:
        raise OSError(28, "No space left on device", "caches/x")

    def told() -> None:
        with what_stays(lambda: "at step 7, with step 5 saved"):
            full()

    assert said_by(full, capsys, exit_code=2) == "coldstill: caches/x: No space left on device\n"
    said = said_by(told, capsys, exit_code=2)
    assert said == "coldstill: caches/x: No space left on device, at step 7, with step 5 saved\n"


@pytest.mark.parametrize(
    ("comes", "done"),
    [
        pytest.param("once, and is delivered", ["a step"], id="delivered"),
        pytest.param("twice", [], id="twice"),
        pytest.param("once", ["a step", "all steps"], id="at the end"),
    ],
)
def test_the_first_signal_waits_until_it_is_delivered_and_the_second_does_not(comes: str, done: list[str]):
    did = []

    def work() -> None:
        with signals_wait() as waiting:
            signal.raise_signal(signal.SIGINT)
            assert waiting.number == signal.SIGINT
            if comes == "twice":
                signal.raise_signal(signal.SIGINT)
            did.append("a step")
            if comes == "once, and is delivered":
                waiting.deliver()
            did.append("all steps")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert did == done


@pytest.mark.parametrize(
    ("error", "ends_as"),
    [
        pytest.param(RuntimeError("DataLoader worker exited unexpectedly"), KeyboardInterrupt, id="what it broke"),
        pytest.param(RecipeError("it cannot be"), RecipeError, id="a mistake of the user's"),
        pytest.param(OSError(28, "No space left on device"), OSError, id="a full disk"),
    ],
)
def test_a_signal_outlives_what_it_broke_but_not_what_is_the_users_to_mend(
    error: Exception, ends_as: type[BaseException]
):
    def work() -> None:
        with signals_wait():
            signal.raise_signal(signal.SIGINT)
            raise error

    with pytest.raises(ends_as):
        work()


def test_handlers_are_as_they_were_and_an_ignored_signal_stays_ignored():
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        before = signal.getsignal(signal.SIGINT)
        with signals_wait() as waiting:
            assert signal.getsignal(signal.SIGINT) is not before
            signal.raise_signal(signal.SIGTERM)
            assert waiting.number is None
        assert signal.getsignal(signal.SIGINT) is before
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_another_thread_than_the_main_one_works_and_hears_nothing():
    heard = []

    def work() -> None:
        with signals_wait() as waiting:
            heard.append(waiting.number)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert heard == [None]
