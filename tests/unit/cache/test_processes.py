"""Tokens of processes: who lives, who is dead, and of whom nobody can tell."""

import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from coldstill.cache.processes import describe_process, is_dead, process_token

CHILD = """
import sys
from coldstill.cache.processes import is_dead, process_token
print(process_token(), is_dead(sys.argv[1]), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    """Start a process that prints its token and what it thinks of this one's, and then waits."""
    command = [sys.executable, "-c", CHILD, process_token()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        yield started
        started.kill()


def said(child: subprocess.Popen[str]) -> list[str]:
    assert child.stdout is not None
    return child.stdout.readline().split()


def test_a_token_is_made_of_what_file_names_and_other_parsers_leave_alone():
    assert re.fullmatch(r"[0-9a-f]{12}-\d+-\d+", process_token())
    assert process_token() == process_token()


def test_this_process_is_alive():
    assert is_dead(process_token()) is False


def test_a_process_is_alive_until_it_is_killed(child: subprocess.Popen[str]):
    token, thinks_dead = said(child)
    assert token != process_token()
    assert is_dead(token) is False
    assert thinks_dead == "False", "each can tell of the other"
    child.kill()
    child.wait()
    assert is_dead(token) is True


def test_a_halted_process_is_not_dead(child: subprocess.Popen[str]):
    token, _ = said(child)
    child.send_signal(signal.SIGSTOP)
    assert is_dead(token) is False


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="needs a look at a dead child that leaves it unreaped")
def test_a_killed_process_that_nobody_has_waited_for_is_dead(child: subprocess.Popen[str]):
    # So it stays in a container whose first process reaps nobody.
    token, _ = said(child)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE
    assert is_dead(token) is True


def test_a_process_with_the_id_of_a_dead_one_is_not_that_one():
    machine, process_id, started = process_token().split("-")
    assert is_dead(f"{machine}-{process_id}-{int(started) + 1000}") is True


def test_an_id_that_no_process_has_is_dead():
    machine, _, started = process_token().split("-")
    free = next(number for number in range(4_000_000, 3_000_000, -1) if not psutil.pid_exists(number))
    assert is_dead(f"{machine}-{free}-{started}") is True


def test_nobody_can_tell_of_a_process_on_another_machine():
    _, process_id, started = process_token().split("-")
    assert is_dead(f"0123456789ab-{process_id}-{started}") is None


@pytest.mark.parametrize("token", ["", "x", "a-b", "a-b-c", "a-b-c-d", "a-1-2-3"])
def test_nobody_can_tell_of_what_is_no_token(token: str):
    assert is_dead(token) is None


@pytest.mark.parametrize("middle", ["b", "", "-1", "1.5", "²"])  # a superscript is a digit to `str.isdigit`
def test_a_token_of_this_machine_without_a_process_id_is_no_token(middle: str):
    machine, _, started = process_token().split("-")
    assert is_dead(f"{machine}-{middle}-{started}") is None


@pytest.mark.skipif(sys.platform != "linux", reason="fakes what Linux says of the system's start")
def test_a_clock_that_was_set_makes_nobody_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # The time of the system's start is the clock less the uptime: setting the clock moves it under living processes.
    token = process_token()
    booted = psutil.boot_time()
    processes = tmp_path / "proc"
    processes.mkdir()
    for name in ("stat", str(os.getpid())):
        (processes / name).symlink_to(f"/proc/{name}")
    started = (processes / "stat").read_text().replace(f"btime {booted:.0f}", f"btime {booted + 3:.0f}")
    (processes / "stat").unlink()
    (processes / "stat").write_text(started)
    monkeypatch.setattr("psutil.PROCFS_PATH", str(processes))
    assert psutil.boot_time() == booted + 3
    assert is_dead(token) is False


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 warns of any fork beside threads
def test_a_forked_process_has_a_token_of_its_own():
    token = process_token()
    reader, writer = os.pipe()
    process_id = os.fork()
    if process_id == 0:
        os.write(writer, process_token().encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        forked = stream.read()
    os.waitpid(process_id, 0)
    assert forked.split("-")[1] == str(process_id)
    assert forked != token
    assert is_dead(forked) is True


@pytest.mark.parametrize(("node", "is_another"), [("elsewhere", True), (platform.node(), False)])
def test_another_boot_and_another_container_are_other_machines(node: str, is_another: bool):
    """Told apart by what a process finds at its start, and so asked of a new one."""
    code = f"import platform; platform.node = lambda: {node!r}\n{CHILD}"
    said = subprocess.run(
        [sys.executable, "-c", code, process_token()],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert (said[0].split("-")[0] != process_token().split("-")[0]) == is_another
    assert said[1] == ("None" if is_another else "False")


def test_a_person_is_told_the_process_id_and_whether_it_runs_elsewhere():
    assert describe_process(process_token()) == f"process {os.getpid()}"
    assert describe_process("0123456789ab-77-1") == "process 77 on another machine"
    assert describe_process("what") == "process what"
