import errno
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from coldstill.cache.local_objects import PARTIAL_FOLDER, LocalObjects
from coldstill.cache.objects import Objects, open_objects
from coldstill.cache.processes import process_token
from coldstill.cache.remote_objects import RemoteObjects


@pytest.fixture(params=["local", "remote"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    return open_objects(tmp_path / "root" if request.param == "local" else f"memory://{uuid4().hex}/root")


def test_the_root_decides_where_objects_lie(tmp_path: Path):
    assert isinstance(open_objects(tmp_path), LocalObjects)
    assert isinstance(open_objects("memory://some/root/"), RemoteObjects)
    assert open_objects("memory://some/root/").root == "memory://some/root"


def test_a_file_url_is_the_folder_that_it_names(tmp_path: Path):
    objects = open_objects(f"file://{tmp_path}/root")
    assert isinstance(objects, LocalObjects)
    assert objects.root == str(tmp_path / "root")
    objects.write("a", b"x")
    assert (tmp_path / "root" / "a").read_bytes() == b"x"


def test_a_root_stays_where_it_is_when_the_process_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    objects = open_objects("root")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    objects.write("a", b"x")
    assert (tmp_path / "root" / "a").read_bytes() == b"x"


def test_opening_a_root_touches_nothing(tmp_path: Path):
    open_objects(tmp_path / "root")
    assert list(tmp_path.iterdir()) == []


def test_an_object_reads_as_it_was_written(objects: Objects):
    objects.write("a/b/c", b"0123456789")
    assert objects.read("a/b/c") == b"0123456789"
    assert objects.exists("a/b/c")


def test_an_empty_object_is_an_object(objects: Objects):
    objects.write("empty", b"")
    assert objects.exists("empty")
    assert objects.read("empty") == b""
    assert objects.read_ranges([("empty", 0, 4)]) == [b""]


def test_a_second_write_replaces_the_first(objects: Objects):
    objects.write("a", b"a long first one")
    objects.write("a", b"short")
    assert objects.read("a") == b"short"
    assert objects.files("") == ["a"]


def test_objects_that_are_written_together_are_all_there(objects: Objects):
    contents = {f"folder/{number}/{name}": f"{number}{name}".encode() for number in range(20) for name in "ab"}
    objects.write_all(contents)
    assert {name: objects.read(name) for name in contents} == contents
    objects.write_all({})
    assert objects.sizes("").keys() == contents.keys()


@pytest.mark.parametrize(
    ("start", "num_bytes", "expected"),
    [(0, 10, b"0123456789"), (3, 4, b"3456"), (8, 4, b"89"), (10, 4, b""), (25, 4, b""), (2, 0, b"")],
)
def test_a_range_is_cut_where_the_object_ends(objects: Objects, start: int, num_bytes: int, expected: bytes):
    objects.write("a", b"0123456789")
    assert objects.read_ranges([("a", start, num_bytes)]) == [expected]


def test_ranges_come_in_the_order_in_which_they_were_asked_for(objects: Objects):
    objects.write_all({"a": b"0123456789", "b/c": b"abcdefghij"})
    ranges = [("b/c", 8, 9), ("a", 0, 2), ("a", 5, 1), ("b/c", 0, 3), ("a", 0, 2)]
    assert objects.read_ranges(ranges) == [b"ij", b"01", b"5", b"abc", b"01"]
    assert objects.read_ranges([]) == []


@pytest.mark.parametrize("start", [0, 2])
def test_a_missing_object_is_not_found(objects: Objects, start: int):
    objects.write("folder/a", b"x")
    for name in ("b", "folder/b", "elsewhere/a"):
        with pytest.raises(FileNotFoundError):
            objects.read(name)
        with pytest.raises(FileNotFoundError) as caught:
            objects.read_ranges([("folder/a", 0, 1), (name, start, 1), ("folder/a", 0, 1)])
        assert caught.value.filename == name
        assert not objects.exists(name)
        assert objects.modified(name) is None


def test_a_folder_is_no_object(objects: Objects):
    objects.write("folder/a", b"x")
    assert not objects.exists("folder")


def test_files_are_sorted_and_leave_out_what_lies_deeper(objects: Objects):
    for name in ("folder/b", "folder/a", "folder/inner/c", "other/d", "folder.e"):
        objects.write(name, b"x")
    assert objects.files("folder") == ["a", "b"]
    assert objects.files("folder/inner") == ["c"]
    assert objects.files("") == ["folder.e"]
    assert objects.files("nowhere") == []


def test_folders_are_sorted_and_leave_out_files_and_what_lies_deeper(objects: Objects):
    for name in ("z/a", "folder/inner/deep/c", "folder/a/d", "folder/e", "f"):
        objects.write(name, b"x")
    assert objects.folders("") == ["folder", "z"]
    assert objects.folders("folder") == ["a", "inner"]
    assert objects.folders("folder/a") == []
    assert objects.folders("nowhere") == []


def test_sizes_are_those_of_all_objects_below_a_folder_named_from_the_root(objects: Objects):
    objects.write_all({"a": b"1", "b/c": b"22", "b/d/e": b"333", "bb/f": b"", "b.g": b"4444"})
    assert objects.sizes("b") == {"b/c": 2, "b/d/e": 3}
    assert objects.sizes("b/d") == {"b/d/e": 3}
    assert objects.sizes("") == {"a": 1, "b/c": 2, "b/d/e": 3, "bb/f": 0, "b.g": 4}
    assert objects.sizes("nowhere") == {}


def test_files_see_what_another_view_of_the_root_wrote(objects: Objects):
    objects.write("folder/a", b"x")
    assert objects.files("folder") == ["a"]
    open_objects(objects.root).write("folder/b", b"x")
    assert objects.files("folder") == ["a", "b"]


def test_an_object_says_when_it_was_written(objects: Objects):
    objects.write("a", b"x")
    written = objects.modified("a")
    assert written is not None
    assert abs(datetime.now(UTC) - written) < timedelta(minutes=1)


def test_removing_removes_one_object_or_nothing(objects: Objects):
    objects.write("folder/a", b"x")
    objects.write("folder/b", b"x")
    for _ in range(2):
        objects.remove("folder/a")
        assert objects.files("folder") == ["b"]


def test_removing_a_folder_leaves_its_neighbours(objects: Objects):
    for name in ("hidden/1/a", "hidden/1/deep/b", "hidden/10/c", "hidden/d"):
        objects.write(name, b"x")
    for _ in range(2):
        objects.remove_folder("hidden/1")
        assert not objects.exists("hidden/1/a")
        assert objects.files("hidden/1/deep") == []
        assert objects.files("hidden/10") == ["c"]
        assert objects.files("hidden") == ["d"]


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_a_local_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str):
    objects = LocalObjects(str(tmp_path))
    objects.write("a", b"first")

    def disk_is_full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for write in (lambda: objects.write("a", b"second"), lambda: objects.write_all({"a": b"second", "b/c": b"third"})):
        with monkeypatch.context() as patch:
            patch.setattr(step, disk_is_full)
            with pytest.raises(OSError, match="No space left on device"):
                write()
        assert objects.read("a") == b"first"
        assert files_below(tmp_path) == ["a"]


def test_local_objects_are_synced_before_they_take_their_names_and_their_folders_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / PARTIAL_FOLDER).mkdir()
    (tmp_path / "folder").mkdir()
    events = []
    replace = Path.replace

    def record_sync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        events.append("sync file" if path.is_file() else f"sync {path.name}")

    monkeypatch.setattr("os.fsync", record_sync)
    monkeypatch.setattr(Path, "replace", lambda path, target: (events.append("replace"), replace(path, target))[1])
    LocalObjects(str(tmp_path)).write_all({"folder/a": b"x", "folder/b": b"y"})
    assert events == ["sync file", "sync file", "replace", "replace", "sync folder"]


def test_a_new_local_folder_has_reached_the_disk_when_a_write_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / PARTIAL_FOLDER).mkdir()
    synced = set()
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.add(Path(f"/proc/self/fd/{descriptor}").resolve()))
    LocalObjects(str(tmp_path)).write("outer/inner/a", b"x")
    assert {tmp_path, tmp_path / "outer", tmp_path / "outer" / "inner"} <= synced


def test_a_folder_that_a_failed_write_made_has_reached_the_disk_when_the_next_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    objects = LocalObjects(str(tmp_path))
    synced = set()
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.add(Path(f"/proc/self/fd/{descriptor}").resolve()))

    def disk_is_full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", disk_is_full)
        with pytest.raises(OSError, match="No space left on device"):
            objects.write("outer/inner/a", b"x")
    objects.write("outer/inner/a", b"x")
    assert {tmp_path, tmp_path / "outer", tmp_path / "outer" / "inner"} <= synced


def test_a_killed_writers_partial_file_is_no_object(tmp_path: Path):
    objects = LocalObjects(str(tmp_path))
    objects.write("a", b"x")
    (tmp_path / PARTIAL_FOLDER / f"{process_token()}.0123").write_bytes(b"half")
    assert objects.files("") == ["a"]
    assert objects.folders("") == []
    assert objects.sizes("") == {"a": 1}


def dead_token() -> str:
    """Give the token of a process that has ended."""
    code = "from coldstill.cache.processes import process_token; print(process_token())"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return finished.stdout.strip()


@pytest.mark.parametrize("is_alone", [False, True], ids=["among others", "alone"])
def test_a_sweep_removes_what_the_dead_left_and_spares_the_living(tmp_path: Path, is_alone: bool):
    objects = LocalObjects(str(tmp_path))
    objects.write("a", b"x")
    folder = tmp_path / PARTIAL_FOLDER
    dead, living, elsewhere = (folder / f"{token}.0" for token in (dead_token(), process_token(), "0123456789ab-7-1"))
    for file in (dead, living, elsewhere):
        file.write_bytes(b"half")
    assert objects.sweep(is_alone=is_alone) == (2 if is_alone else 1)
    assert sorted(folder.iterdir()) == ([living] if is_alone else sorted([living, elsewhere]))
    living.unlink()
    objects.sweep(is_alone=True)
    assert not folder.exists()
    assert objects.read("a") == b"x"
    assert objects.sweep(is_alone=True) == 0


def test_a_writer_goes_on_after_a_sweep_took_the_folder_of_partial_files(tmp_path: Path):
    objects = LocalObjects(str(tmp_path))
    objects.write("a", b"x")
    objects.sweep(is_alone=True)
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
    objects.write("b", b"y")
    assert objects.read("b") == b"y"


def test_a_sweep_of_nothing_is_no_error(objects: Objects):
    assert objects.sweep(is_alone=True) == 0
    assert objects.sweep(is_alone=False) == 0
