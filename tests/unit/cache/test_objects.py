import errno
from pathlib import Path
from uuid import uuid4

import pytest

from cache.objects import LocalObjects, Objects, RemoteObjects, open_objects


@pytest.fixture(params=["local", "remote"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    return open_objects(tmp_path / "root" if request.param == "local" else f"memory://{uuid4().hex}/root")


def test_the_root_decides_where_objects_lie(tmp_path: Path):
    assert isinstance(open_objects(tmp_path), LocalObjects)
    assert isinstance(open_objects("memory://some/root/"), RemoteObjects)
    assert open_objects("memory://some/root/").root == "memory://some/root"


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
    assert objects.read_range("empty", 0, 4) == b""


def test_a_second_write_replaces_the_first(objects: Objects):
    objects.write("a", b"a long first one")
    objects.write("a", b"short")
    assert objects.read("a") == b"short"
    assert objects.list("") == ["a"]


@pytest.mark.parametrize(
    ("start", "num_bytes", "expected"),
    [
        (0, 10, b"0123456789"),
        (3, 4, b"3456"),
        (8, 4, b"89"),
        (10, 4, b""),
        (-4, 2, b"67"),
        (-3, 9, b"789"),
        (2, 0, b""),
    ],
)
def test_a_range_is_cut_where_the_object_ends(objects: Objects, start: int, num_bytes: int, expected: bytes):
    objects.write("a", b"0123456789")
    assert objects.read_range("a", start, num_bytes) == expected


def test_a_range_from_before_the_object_starts_with_the_object(objects: Objects):
    objects.write("a", b"0123")
    assert objects.read_range("a", -20, 20) == b"0123"


@pytest.mark.parametrize("start", [0, 2, -2])
def test_a_missing_object_is_not_found(objects: Objects, start: int):
    objects.write("folder/a", b"x")
    for name in ("b", "folder/b", "elsewhere/a"):
        with pytest.raises(FileNotFoundError):
            objects.read(name)
        with pytest.raises(FileNotFoundError):
            objects.read_range(name, start, 1)
        assert not objects.exists(name)


def test_a_folder_is_no_object(objects: Objects):
    objects.write("folder/a", b"x")
    assert not objects.exists("folder")


def test_a_list_is_sorted_and_leaves_out_what_lies_deeper(objects: Objects):
    for name in ("folder/b", "folder/a", "folder/inner/c", "other/d", "folder.e"):
        objects.write(name, b"x")
    assert objects.list("folder") == ["a", "b"]
    assert objects.list("folder/inner") == ["c"]
    assert objects.list("nowhere") == []


def test_a_list_sees_what_another_view_of_the_root_wrote(objects: Objects):
    objects.write("folder/a", b"x")
    assert objects.list("folder") == ["a"]
    open_objects(objects.root).write("folder/b", b"x")
    assert objects.list("folder") == ["a", "b"]


def test_removing_removes_one_object_or_nothing(objects: Objects):
    objects.write("folder/a", b"x")
    objects.write("folder/b", b"x")
    for _ in range(2):
        objects.remove("folder/a")
        assert objects.list("folder") == ["b"]


def test_removing_a_folder_leaves_its_neighbours(objects: Objects):
    for name in ("hidden/1/a", "hidden/1/deep/b", "hidden/10/c", "hidden/d"):
        objects.write(name, b"x")
    for _ in range(2):
        objects.remove_folder("hidden/1")
        assert not objects.exists("hidden/1/a")
        assert objects.list("hidden/1/deep") == []
        assert objects.list("hidden/10") == ["c"]
        assert objects.list("hidden") == ["d"]


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_a_local_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str):
    objects = LocalObjects(str(tmp_path))
    objects.write("a", b"first")

    def disk_is_full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(step, disk_is_full)
        with pytest.raises(OSError, match="No space left on device"):
            objects.write("a", b"second")
    assert objects.read("a") == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_local_object_is_synced_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    events = []
    sync, replace = __import__("os").fsync, Path.replace
    monkeypatch.setattr("os.fsync", lambda descriptor: (events.append("sync"), sync(descriptor))[1])
    monkeypatch.setattr(Path, "replace", lambda path, target: (events.append("replace"), replace(path, target))[1])
    LocalObjects(str(tmp_path)).write("a", b"x")
    assert events == ["sync", "replace", "sync"]


def test_a_killed_writers_partial_file_is_no_object(tmp_path: Path):
    objects = LocalObjects(str(tmp_path))
    objects.write("a", b"x")
    (tmp_path / "b.0123.partial").write_bytes(b"half")
    assert objects.list("") == ["a"]
