"""A disk that is full, broken or read-only, and a run that is told to stop: one line, nothing half-made, and go on."""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from crash.signals import CHILD_TIMEOUT_S, started
from crash.trees import difference, lasting_files_below, small_recipe
from forked import Forks
from safetensors import SafetensorError
from typer.testing import CliRunner, Result

from coldstill.pipeline.verify import verify

# What stays of `precompute`, by how far it had come.
STAYS = (
    r"(before it came to the shards; run the same command again"
    r"|before the first of \d+ shards was complete; the same command begins with it"
    r"|with [1-9]\d* of \d+ shards complete; run the same command again to go on)"
)
STEPS = ("write", "sync", "publish")


@dataclass(frozen=True)
class Place:
    """A recipe in a folder of its own."""

    folder: Path
    recipe: Path

    @property
    def root(self) -> Path:
        return self.folder / "caches"

    def precompute(self) -> Result:
        from coldstill.cli import app

        result = CliRunner().invoke(app, ["precompute", str(self.recipe)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    def clear(self) -> None:
        for name in ("caches", "run"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def check_rest(self, whole: dict[str, bytes]) -> None:
        """Check that a run which failed left nothing half-made, and that the next one comes to the same bytes."""
        left = lasting_files_below(self.root) if self.root.exists() else {}
        assert not [name for name in left if ".partial" in name or "writers/" in name]
        assert not [name for name in left.keys() & whole.keys() if left[name] != whole[name]]
        if left.keys() & {name for name in whole if name.startswith(("stores/", "index/"))}:
            audit = verify(str(self.root), show_progress=False)
            assert audit.is_clean, audit
        assert self.precompute().exit_code == 0
        assert difference(lasting_files_below(self.root), whole) == {}


def make_place(
    folder: Path, teacher: Path, text: list[str], *, batch_size: int = 4, train_rows: int = 6, eval_rows: int = 3
) -> Place:
    data = small_recipe(folder, teacher, text, train_rows=train_rows, eval_rows=eval_rows, batch_size=batch_size)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(data))
    return Place(folder, folder / "recipe.yaml")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model_folders: dict[str, Path], corpus: list[str]) -> Place:
    """A recipe of three shards and few columns, once `small_shards` is in force."""
    return make_place(tmp_path_factory.mktemp("disks"), model_folders["teacher"], corpus[:30])


@pytest.fixture(autouse=True)
def _small_and_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make shards small; leave out syncs, as no test here outlives its machine."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr("coldstill.cache.laying.SHARD_TOKENS", 96)


@dataclass(frozen=True)
class Fault:
    """A disk that refuses: from the nth step of a kind on, or at that one alone.

    Attributes:
        step: `write` for the bytes of an object, of which only half arrive, `sync`, or `publish` for a rename.
        number: Which one, from 1.
        code: What the operating system says.
        lasts: Whether all later ones of that kind fail too.
    """

    step: str
    number: int
    code: int
    lasts: bool

    def __str__(self) -> str:
        return f"{errno.errorcode[self.code]} {'from' if self.lasts else 'at'} {self.step} {self.number}"


class FullFile:
    """A new file of which only half of what is written arrives."""

    def __init__(self, file: Any, error: OSError) -> None:
        self._file, self._error = file, error

    def __enter__(self) -> "FullFile":
        return self

    def __exit__(self, *_about: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> int:
        self._file.write(data[: len(data) // 2])
        raise self._error


class Disk:
    """Counts the steps by which a run writes below a folder, and fails where a fault says so."""

    def __init__(self, folder: Path, fault: Fault | None = None) -> None:
        self.counts = dict.fromkeys(STEPS, 0)
        self._folder = str(folder)
        self._fault = fault
        self._lock = threading.Lock()

    def install(self, patch: pytest.MonkeyPatch) -> None:
        opened = Path.open

        def opening(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            file = opened(path, mode, *arguments, **options)
            if mode == "xb" and str(path).startswith(self._folder) and self._fails("write"):
                return FullFile(file, self._error(path))
            return file

        def synced(descriptor: int) -> None:
            if self._fails("sync"):
                raise self._error(None)

        def renamed(rename: Callable[..., None]) -> Callable[..., None]:
            def published(source: Any, target: Any, **options: Any) -> None:
                if str(target).startswith(self._folder) and self._fails("publish"):
                    raise self._error(target)
                rename(source, target, **options)

            return published

        patch.setattr(Path, "open", opening)
        patch.setattr(os, "fsync", synced)
        for name in ("replace", "rename"):
            patch.setattr(os, name, renamed(getattr(os, name)))

    def _fails(self, step: str) -> bool:
        with self._lock:  # files may be synced by several threads
            self.counts[step] += 1
            number = self.counts[step]
        fault = self._fault
        if fault is None or fault.step != step:
            return False
        return number >= fault.number if fault.lasts else number == fault.number

    def _error(self, path: Any) -> OSError:
        assert self._fault is not None
        named = () if path is None else (str(path),)
        return OSError(self._fault.code, os.strerror(self._fault.code), *named)


@dataclass(frozen=True)
class Whole:
    """What a run leaves on a good disk, and how many steps of each kind it takes."""

    files: dict[str, bytes]
    counts: dict[str, int]


@pytest.fixture(scope="module")
def whole(place: Place) -> Iterator[Whole]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        patch.setattr("coldstill.cache.laying.SHARD_TOKENS", 96)
        place.precompute()  # makes the copy of the text that `datasets` keeps
        place.clear()
        disk = Disk(place.folder)
        disk.install(patch)
        assert place.precompute().exit_code == 0
    yield Whole(lasting_files_below(place.root), disk.counts)
    place.clear()


def said_by(stderr: str) -> list[str]:
    """Give the lines of standard error that are no progress bar's."""
    lines = [part for line in stderr.splitlines() for part in line.split("\r")]
    return [line for line in lines if line.strip() and not line.startswith(("precompute:", "calibrate", "verify:"))]


def check_fault(place: Place, whole: Whole, fault: Fault) -> None:
    place.clear()
    with pytest.MonkeyPatch.context() as patch:
        Disk(place.folder, fault).install(patch)
        result = place.precompute()
    assert result.exit_code == 2, f"{fault}: exit code {result.exit_code}"
    (line,) = said_by(result.stderr)
    assert line.startswith("coldstill: "), f"{fault}: {line}"
    assert re.search(f": {os.strerror(fault.code)}, {STAYS}$", line), f"{fault}: {line}"
    place.check_rest(whole.files)


def numbers_of(count: int, num_chosen: int) -> list[int]:
    """Choose numbers from 1 to a count, the first and the last among them."""
    return sorted({1 + round(index * (count - 1) / (num_chosen - 1)) for index in range(num_chosen)})


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("code", "lasts"), [(errno.ENOSPC, True), (errno.EIO, False)], ids=["full", "broken once"])
def test_a_disk_that_refuses_is_one_line_and_the_next_run_completes(
    place: Place, whole: Whole, step: str, code: int, lasts: bool
):
    assert whole.counts[step] > 50
    for number in numbers_of(whole.counts[step], 5):
        check_fault(place, whole, Fault(step, number, code, lasts))


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("code", "lasts"), [(errno.ENOSPC, True), (errno.EIO, False)], ids=["full", "broken once"])
def test_a_disk_that_refuses_at_any_step_is_one_line_and_the_next_run_completes(
    place: Place, whole: Whole, step: str, code: int, lasts: bool
):
    for number in range(1, whole.counts[step] + 1):
        check_fault(place, whole, Fault(step, number, code, lasts))


def test_a_disk_that_is_full_when_the_student_is_saved_is_one_line(
    place: Place, whole: Whole, monkeypatch: pytest.MonkeyPatch
):
    """Safetensors writes by itself, and raises an error of its own, which is no OSError."""

    def full(*_arguments: Any, **_options: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    place.clear()
    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", full)
        result = place.precompute()
    assert result.exit_code == 2
    (line,) = said_by(result.stderr)
    assert line.startswith("coldstill: ")
    assert "No space left on device" in line
    place.check_rest(whole.files)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES], ids=["read-only disk", "no permission"])
def test_a_folder_that_cannot_be_written_is_one_line(
    place: Place, whole: Whole, monkeypatch: pytest.MonkeyPatch, code: int
):
    mkdir = os.mkdir

    def refused(path: Any, *arguments: Any, **options: Any) -> None:
        if str(path).startswith(str(place.root)) and Path(path).parent.is_dir():
            raise OSError(code, os.strerror(code), str(path))
        mkdir(path, *arguments, **options)

    place.clear()
    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", refused)
        result = place.precompute()
    assert result.exit_code == 2
    (line,) = said_by(result.stderr)
    before = "before it came to the shards; run the same command again"
    assert line == f"coldstill: {place.root}: {os.strerror(code)}, {before}"
    assert not place.root.exists()
    place.check_rest(whole.files)


@pytest.mark.skipif(os.geteuid() == 0, reason="a superuser writes into read-only folders")
def test_a_read_only_folder_is_one_line(place: Place, whole: Whole):
    place.clear()
    place.root.mkdir(mode=0o555)
    result = place.precompute()
    assert result.exit_code == 2
    (line,) = said_by(result.stderr)
    assert (
        line
        == f"coldstill: cache {place.root} cannot be written: no permission to write in {place.root}; choose another"
    )
    place.root.chmod(0o755)
    place.check_rest(whole.files)


def test_a_file_in_place_of_the_root_is_one_line(place: Place, whole: Whole):
    place.clear()
    place.root.write_text("not a folder")
    result = place.precompute()
    assert result.exit_code == 2
    (line,) = said_by(result.stderr)
    assert line == f"coldstill: cache {place.root} cannot be written: {place.root} is no folder; choose another"
    assert place.root.read_text() == "not a folder"
    place.root.unlink()
    place.check_rest(whole.files)


@dataclass(frozen=True)
class Stop:
    """When a child is told to stop: once a file of this pattern is in the root, and some time later."""

    name: str
    pattern: str
    delay_s: float = 0.0
    says: str = ""


AT_TOKENS = Stop("the first tokens are committed", "stores/*/commits/*~tokens.json")
AT_COLUMN = Stop("the first column is committed", "stores/*/commits/*~label_logit.json")
AT_STUDENT = Stop("the student is being made", "students/.*.partial", says="before it came to the shards")
EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.fixture(scope="module")
def long_run(
    tmp_path_factory: pytest.TempPathFactory, model_folders: dict[str, Path], corpus: list[str]
) -> tuple[Place, dict[str, bytes]]:
    """A recipe whose run takes a second or more, with all shards of the usual size, and what it comes to."""
    folder = tmp_path_factory.mktemp("signals")
    sizes = {"batch_size": 1, "train_rows": 120, "eval_rows": 30}
    place = make_place(folder, model_folders["teacher"], corpus, **sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        patch.setattr("coldstill.cache.laying.SHARD_TOKENS", 32_768)
        assert place.precompute().exit_code == 0
    return place, lasting_files_below(place.root)


def stopped(forks: Forks, place: Place, number: int, stop: Stop) -> subprocess.CompletedProcess[str]:
    """Run `precompute` in a process of its own, and send it a signal when it has come so far."""
    with started(forks, "precompute", str(place.recipe)) as child:
        deadline = time.monotonic() + CHILD_TIMEOUT_S
        while child.poll() is None and time.monotonic() < deadline and not any(place.root.glob(stop.pattern)):
            time.sleep(0.002)
        time.sleep(stop.delay_s)
        child.send_signal(number)
        stdout, stderr = child.communicate(timeout=CHILD_TIMEOUT_S)
    return subprocess.CompletedProcess(child.args, child.returncode, stdout, stderr)


def check_stop(
    forks: Forks, long_run: tuple[Place, dict[str, bytes]], number: int, stop: Stop, patch: pytest.MonkeyPatch
) -> None:
    place, whole = long_run
    place.clear()
    patch.setattr("coldstill.cache.laying.SHARD_TOKENS", 32_768)
    ended = stopped(forks, place, number, stop)
    if stop.delay_s and not difference(lasting_files_below(place.root), whole):
        return  # it had come to its end before the signal
    assert ended.returncode == EXIT_CODES[number], ended.stderr
    (line,) = said_by(ended.stderr)
    assert re.fullmatch(f"interrupted {STAYS}", line)
    if stop.says:
        assert stop.says in line
    assert ended.stdout == ""
    place.check_rest(whole)


@pytest.mark.parametrize(
    ("number", "stop"),
    [
        pytest.param(signal.SIGTERM, AT_TOKENS, id="SIGTERM at tokens"),
        pytest.param(signal.SIGINT, AT_COLUMN, id="SIGINT at a column"),
        pytest.param(signal.SIGINT, AT_TOKENS, id="SIGINT at tokens", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, AT_COLUMN, id="SIGTERM at a column", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, AT_STUDENT, id="SIGTERM at the student", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, AT_STUDENT, id="SIGINT at the student", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_told_to_stop_says_so_and_the_next_one_completes(
    forks: Forks, long_run: tuple[Place, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch, number: int, stop: Stop
):
    check_stop(forks, long_run, number, stop, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("number", EXIT_CODES, ids=lambda number: number.name)
def test_a_run_that_is_told_to_stop_at_random_says_so_and_the_next_one_completes(
    forks: Forks, long_run: tuple[Place, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch, number: int
):
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")  # noqa: T201 - shown where the test fails
    generator = random.Random(seed)
    for _ in range(6):
        stop = Stop("random", AT_TOKENS.pattern, generator.uniform(0.001, 0.4))
        check_stop(forks, long_run, number, stop, monkeypatch)
