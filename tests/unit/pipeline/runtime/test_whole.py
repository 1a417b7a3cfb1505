"""Files and folders appear whole or not at all, and what dead processes left of them goes."""

import subprocess
import sys
from pathlib import Path

import pytest

from coldstill.cache.processes import process_token
from coldstill.pipeline.runtime.whole import sweep_siblings, whole_folder, write_whole


@pytest.fixture
def dead_token() -> str:
    """The token of a process that has ended, on this machine."""
    machine, process_id, _ = process_token().split("-")
    return f"{machine}-{process_id}-1"


@pytest.fixture
def living_token() -> str:
    return process_token()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_and_replaced(tmp_path: Path):
    path = tmp_path / "facts.json"
    write_whole(path, "one")
    assert path.read_text() == "one"
    write_whole(path, "two")
    assert path.read_text() == "two"
    assert names(tmp_path) == ["facts.json"]


@pytest.mark.parametrize("method", ["write_text", "replace"])
def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str):
    path = tmp_path / "facts.json"
    write_whole(path, "one")

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, method, full)
        with pytest.raises(OSError, match="No space left"):
            write_whole(path, "two")
    assert path.read_text() == "one"
    assert names(tmp_path) == ["facts.json"]


def test_a_folder_takes_its_place_when_it_is_full_and_not_before(tmp_path: Path):
    folder = tmp_path / "deep/student"
    with whole_folder(folder) as partial:
        (partial / "model").write_text("weights")
        (partial / "inner").mkdir()
        (partial / "inner/file").write_text("more")
        assert not folder.exists()
    assert (folder / "model").read_text() == "weights"
    assert (folder / "inner/file").read_text() == "more"
    assert names(folder.parent) == ["student"]


def test_a_folder_replaces_the_one_before_with_nothing_of_it_left(tmp_path: Path):
    folder = tmp_path / "student"
    with whole_folder(folder) as partial:
        (partial / "old").write_text("old")
    with whole_folder(folder) as partial:
        (partial / "new").write_text("new")
        assert names(folder) == ["old"]
    assert names(folder) == ["new"]
    assert names(tmp_path) == ["student"]


def half_fill(folder: Path, error: BaseException) -> None:
    with whole_folder(folder) as partial:
        (partial / "new").write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_folder_that_could_not_be_filled_leaves_what_was_there(tmp_path: Path, error: type[BaseException]):
    folder = tmp_path / "student"
    with whole_folder(folder) as partial:
        (partial / "old").write_text("old")
    with pytest.raises(error):
        half_fill(folder, error())
    assert names(folder) == ["old"]
    assert names(tmp_path) == ["student"]


def test_a_folder_that_could_not_be_filled_the_first_time_leaves_nothing(tmp_path: Path):
    with pytest.raises(ValueError, match="no"):
        half_fill(tmp_path / "student", ValueError("no"))
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [1, 2])
def test_a_folder_that_could_not_take_its_place_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    folder = tmp_path / "student"
    with whole_folder(folder) as partial:
        (partial / "old").write_text("old")
    rename, num_calls = Path.rename, 0

    def broken_once(path: Path, target: Path) -> Path:
        nonlocal num_calls
        num_calls += 1
        if num_calls == number:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", broken_once)
        with pytest.raises(OSError, match="Input/output"), whole_folder(folder) as partial:
            (partial / "new").write_text("new")
    assert num_calls >= number
    assert names(tmp_path) == ["student"]
    assert names(folder) == ["old"]


def leave(folder: Path, name: str, token: str) -> dict[str, Path]:
    """Leave what a process half-made of a file, of a folder, and of a folder that it was about to replace."""
    left = {
        "file": folder / f".{name}.{token}.partial",
        "replaced folder": folder / f".{name}.{token}.old.partial",
    }
    left["file"].write_text("half")
    left["replaced folder"].mkdir()
    (left["replaced folder"] / "model").write_text("old")
    return left


def test_what_dead_processes_left_is_swept_and_what_living_ones_make_is_kept(
    tmp_path: Path, dead_token: str, living_token: str
):
    dead = leave(tmp_path, "student", dead_token)
    living = leave(tmp_path, "student", living_token)
    elsewhere = leave(tmp_path, "student", f"another-{living_token.split('-', 1)[1]}")
    others = leave(tmp_path, "another", dead_token)
    unrelated = tmp_path / ".student.partial"
    unrelated.write_text("of somebody who leaves no token")
    sweep_siblings(tmp_path / "student")
    assert not any(path.exists() for path in dead.values())
    assert all(path.exists() for path in [*living.values(), *elsewhere.values(), *others.values(), unrelated])


@pytest.mark.parametrize("make", ["file", "folder"])
@pytest.mark.parametrize("name", ["student", "run [1]"])
def test_making_it_again_sweeps_what_a_dead_process_left(tmp_path: Path, dead_token: str, make: str, name: str):
    leave(tmp_path, name, dead_token)
    if make == "file":
        write_whole(tmp_path / name, "whole")
    else:
        with whole_folder(tmp_path / name) as partial:
            (partial / "model").write_text("weights")
    assert names(tmp_path) == [name]


KILLED = """
import os, signal, sys
from pathlib import Path
from coldstill.pipeline.runtime.whole import whole_folder
with whole_folder(Path(sys.argv[1])) as partial:
    (partial / "new").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_is_killed_while_it_fills_a_folder_leaves_what_was_there_and_is_swept(tmp_path: Path):
    folder = tmp_path / "student"
    with whole_folder(folder) as partial:
        (partial / "old").write_text("old")
    root = Path(__file__).parents[4]
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder)], cwd=root, check=False)
    assert done.returncode == -9
    assert names(folder) == ["old"]
    assert len(names(tmp_path)) == 2
    with whole_folder(folder) as partial:
        (partial / "new").write_text("new")
    assert names(tmp_path) == ["student"]
    assert names(folder) == ["new"]
