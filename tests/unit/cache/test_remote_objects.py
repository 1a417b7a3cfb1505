"""Objects at a URL whose requests fail: what is asked again, what is not, and what the error says."""

import functools
import itertools
import random
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar
from uuid import uuid4

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem

from coldstill.cache import remote_objects
from coldstill.cache.errors import RemoteError
from coldstill.cache.objects import open_objects
from coldstill.cache.remote_objects import RemoteObjects

URL = "faulty://bucket/caches"
ATTEMPTS = 7
ANY = "any"


class FaultyFileSystem(MemoryFileSystem):
    """Memory that behaves as object storage does, with requests that fail by plan.

    A range from beyond the end is an error, a write needs its bucket, and `isfile` asks `info`, as in s3fs.
    """

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    plans: ClassVar[dict[str, Iterator[BaseException | None]]] = {}
    calls: ClassVar[list[tuple[Any, ...]]] = []

    isfile = AbstractFileSystem.isfile

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("faulty://", "memory://"))

    @classmethod
    def reset(cls) -> None:
        cls.clear_instance_cache()
        cls.store.clear()
        cls.pseudo_dirs[:] = ["", "/bucket"]
        cls.plans = {}
        cls.calls = []

    def request(self, operation: str, path: str, *details: Any) -> None:
        self.calls.append((operation, path.removeprefix("/bucket/caches").lstrip("/"), *details))
        fault = next(self.plans.get(operation, self.plans.get(ANY, iter(()))), None)
        if fault is not None:
            raise fault

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        self.request("info", path)
        return super().info(path, **options)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        self.request("cat", path, start, end)
        size = super().info(path)["size"]
        if start is not None and start >= size:
            raise OSError("InvalidRange: the requested range is not satisfiable")
        return super().cat_file(path, start=start, end=end, **options)

    def pipe_file(self, path: str, value: bytes, *args: Any, **options: Any) -> None:
        self.request("pipe", path)
        if "/" + path.strip("/").split("/")[0] not in self.pseudo_dirs:
            raise FileNotFoundError("The specified bucket does not exist")
        super().pipe_file(path, value, *args, **options)

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        self.request("ls", path)
        return super().ls(path, detail=detail, **options)

    def rm_file(self, path: str) -> None:
        self.request("rm", path)
        super().rm_file(path)

    def modified(self, path: str) -> Any:
        self.request("modified", path)
        return super().modified(path)


def called(operation: str) -> list[tuple[Any, ...]]:
    """Give what was asked of one operation, or of any: (object, ...)."""
    return [call[1:] for call in FaultyFileSystem.calls if operation in (call[0], ANY)]


def plan(operation: str, *faults: BaseException | None) -> None:
    FaultyFileSystem.plans[operation] = iter(faults)
    FaultyFileSystem.calls.clear()


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_objects, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(remote_objects, "LONGEST_PAUSE_S", 0.0)
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    FaultyFileSystem.reset()


@pytest.fixture
def objects() -> RemoteObjects:
    """A root with a small nested tree."""
    opened = open_objects(URL)
    assert isinstance(opened, RemoteObjects)
    for name in TREE:
        opened.write(name, name.encode())
    FaultyFileSystem.calls.clear()
    return opened


TREE = ["top", "hidden/1/values/c/0", "hidden/1/zarr.json", "hidden/10/zarr.json", "hidden/zarr.json", "tokens/ids"]


@dataclass(frozen=True)
class Request:
    """One method: which operation below it fails, what to call, what it gives, and which objects it leaves."""

    operation: str
    ask: Callable[[RemoteObjects], Any]
    gives: Any = None
    leaves: tuple[str, ...] = tuple(TREE)


REQUESTS = {
    "read": Request("cat", lambda objects: objects.read("top"), b"top"),
    "read_ranges": Request("cat", lambda objects: objects.read_ranges([("top", 1, 1)]), [b"o"]),
    "write": Request("pipe", lambda objects: objects.write("new", b"x"), leaves=(*TREE, "new")),
    "write_all": Request("pipe", lambda objects: objects.write_all({"new": b"x"}), leaves=(*TREE, "new")),
    "exists": Request(ANY, lambda objects: objects.exists("top"), True),
    "files": Request("ls", lambda objects: objects.files("hidden"), ["zarr.json"]),
    "folders": Request("ls", lambda objects: objects.folders("hidden"), ["1", "10"]),
    "remove": Request(ANY, lambda objects: objects.remove("top"), leaves=tuple(TREE[1:])),
    "remove, having looked": Request("rm", lambda objects: objects.remove("top"), leaves=tuple(TREE[1:])),
    "remove_folder": Request("rm", lambda objects: objects.remove_folder("tokens"), leaves=tuple(TREE[:-1])),
}


def left() -> list[str]:
    return sorted(path.removeprefix("/bucket/caches/") for path in FaultyFileSystem.store)


@pytest.mark.parametrize("num_faults", [1, ATTEMPTS - 1])
@pytest.mark.parametrize("case", REQUESTS)
def test_a_request_that_fails_for_a_while_is_made_again_until_it_succeeds(
    objects: RemoteObjects, case: str, num_faults: int
):
    request = REQUESTS[case]
    plan(request.operation, *[OSError("503 Slow Down")] * num_faults)
    assert request.ask(objects) == request.gives
    assert left() == sorted(request.leaves)
    assert next(FaultyFileSystem.plans[request.operation], None) is None, "the faults were never met"


@pytest.mark.parametrize("case", REQUESTS)
def test_a_request_that_keeps_failing_is_an_error_of_one_line_that_names_url_object_and_attempts(
    objects: RemoteObjects, case: str
):
    request = REQUESTS[case]
    FaultyFileSystem.plans[request.operation] = itertools.repeat(OSError("500\nwe are\n  sorry"))
    with pytest.raises(RemoteError) as raised:
        request.ask(objects)
    message = str(raised.value)
    assert "\n" not in message
    assert f"{URL}/" in message
    assert f"after {ATTEMPTS} attempts: OSError: 500 we are sorry; what was committed stays" in message
    (name,) = {call[0] for call in called(request.operation)}
    assert name.split("/")[0] in message
    num_before = 1 if case == "read_ranges" else 0  # all ranges at once, before each is asked for by itself
    assert len(called(request.operation)) == num_before + ATTEMPTS
    assert left() == sorted(TREE)


LASTING = {
    "permission": PermissionError("Access Denied"),
    "a folder": IsADirectoryError("it is one"),
    "not a folder": NotADirectoryError("it is none"),
    "not there yet": NotImplementedError("no ranges here"),
    "no library": ImportError("install s3fs"),
    "wrong value": ValueError("bad bucket name"),
    "wrong type": TypeError("no number"),
}


@pytest.mark.parametrize("case", LASTING)
@pytest.mark.parametrize("method", ["read", "write", "files"])
def test_an_error_that_lasts_is_told_at_once(objects: RemoteObjects, method: str, case: str):
    request, error = REQUESTS[method], LASTING[case]
    FaultyFileSystem.plans[request.operation] = itertools.repeat(error)
    with pytest.raises(RemoteError) as raised:
        request.ask(objects)
    assert len(called(request.operation)) == 1
    assert f"{type(error).__name__}: {error}" in str(raised.value)
    assert f"{URL}/" in str(raised.value)
    assert "attempts" not in str(raised.value)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interruption_is_not_taken_for_a_failure(objects: RemoteObjects, stop: type[BaseException]):
    plan("cat", stop())
    with pytest.raises(stop):
        objects.read("top")
    assert len(called("cat")) == 1


def test_a_missing_object_is_not_found_at_the_first_attempt_under_its_own_name(objects: RemoteObjects):
    with pytest.raises(FileNotFoundError) as raised:
        objects.read("hidden/2/zarr.json")
    assert raised.value.filename == "hidden/2/zarr.json"
    assert not isinstance(raised.value, RemoteError)
    assert len(called("cat")) == 1


def test_a_missing_object_among_ranges_is_not_found_under_its_own_name(objects: RemoteObjects):
    with pytest.raises(FileNotFoundError) as raised:
        objects.read_ranges([("top", 0, 2), ("gone", 0, 2)])
    assert raised.value.filename == "gone"


@pytest.mark.parametrize("fault", [TimeoutError("no answer"), RuntimeError("client closed"), OSError("reset")])
def test_whatever_may_pass_is_tried_again(objects: RemoteObjects, fault: Exception):
    plan("cat", fault, fault)
    assert objects.read("top") == b"top"
    assert len(called("cat")) == 3


def test_the_pauses_between_attempts_grow_up_to_a_bound(objects: RemoteObjects, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote_objects, "FIRST_PAUSE_S", 1.0)
    monkeypatch.setattr(remote_objects, "LONGEST_PAUSE_S", 6.0)
    pauses: dict[int, list[float]] = defaultdict(list)
    number = itertools.count()
    monkeypatch.setattr("time.sleep", lambda seconds: pauses[next(number) % (ATTEMPTS - 1)].append(seconds))
    random.seed(0)
    for _ in range(200):
        FaultyFileSystem.plans["cat"] = itertools.repeat(OSError("503"))
        with pytest.raises(RemoteError):
            objects.read("top")
    longest = [max(pauses[number]) for number in range(ATTEMPTS - 1)]
    assert longest[0] <= 1.0 < longest[1] <= 2.0 < longest[2] <= 4.0
    assert 5.0 < longest[-1] <= 6.0
    assert min(map(min, pauses.values())) < 0.5 < longest[0], "without chance, machines that failed together meet again"


def test_only_the_ranges_that_failed_are_asked_for_again(objects: RemoteObjects):
    objects.write("long", bytes(range(100)))
    plan("cat", None, OSError("500"), None, OSError("500"), None)
    ranges = [("long", start, 10) for start in range(0, 50, 10)]
    assert objects.read_ranges(ranges) == [bytes(range(start, start + 10)) for start in range(0, 50, 10)]
    asked = Counter(start for _, start, _ in called("cat"))
    assert asked == {0: 1, 10: 2, 20: 1, 30: 2, 40: 1}


@pytest.mark.parametrize(
    ("start", "num_bytes", "expected"), [(0, 10, b"0123"), (3, 4, b"3"), (4, 1, b""), (9, 2, b"")], ids=str
)
def test_a_range_ends_where_its_object_does(objects: RemoteObjects, start: int, num_bytes: int, expected: bytes):
    objects.write("short", b"0123")
    objects.write("empty", b"")
    FaultyFileSystem.calls.clear()
    assert objects.read_ranges([("short", start, num_bytes), ("top", 0, 3)]) == [expected, b"top"]
    assert len(called("cat")) == 2, "a range beyond the end is nothing that another attempt would change"
    assert objects.read_ranges([("empty", start, num_bytes)]) == [b""]


def test_no_ranges_are_no_requests(objects: RemoteObjects):
    assert objects.read_ranges([]) == []
    assert FaultyFileSystem.calls == []


def test_names_and_sizes_of_a_nested_tree(objects: RemoteObjects):
    assert objects.files("") == ["top"]
    assert objects.folders("") == ["hidden", "tokens"]
    assert objects.files("hidden/1") == ["zarr.json"]
    assert objects.folders("hidden/1") == ["values"]
    assert objects.sizes("") == {name: len(name) for name in TREE}
    assert objects.sizes("hidden/1") == {name: len(name) for name in TREE if name.startswith("hidden/1/")}
    for folder in ("hidden/1/values/c/0/none", "nowhere", "nowhere/at/all"):
        assert (objects.files(folder), objects.folders(folder), objects.sizes(folder)) == ([], [], {})


def test_a_folder_is_removed_with_all_below_and_nothing_beside(objects: RemoteObjects):
    for _ in range(2):
        objects.remove_folder("hidden/1")
        assert left() == sorted(name for name in TREE if not name.startswith("hidden/1/"))
    objects.remove_folder("nowhere")


def test_removing_what_is_not_there_is_no_error(objects: RemoteObjects):
    objects.remove("gone")
    objects.remove("hidden")
    assert left() == sorted(TREE)


@pytest.mark.parametrize("method", ["remove", "remove_folder"])
def test_a_removal_whose_answer_was_lost_is_done(objects: RemoteObjects, monkeypatch: pytest.MonkeyPatch, method: str):
    remove = FaultyFileSystem.rm_file
    answers = iter([OSError("connection reset")])

    def removes_and_says_it_failed(self: FaultyFileSystem, path: str) -> None:
        remove(self, path)
        for error in answers:
            raise error

    monkeypatch.setattr(FaultyFileSystem, "rm_file", removes_and_says_it_failed)
    objects.remove("tokens/ids") if method == "remove" else objects.remove_folder("tokens")
    assert left() == sorted(TREE[:-1])


def test_a_folder_is_no_object(objects: RemoteObjects):
    assert not objects.exists("hidden")
    assert not objects.exists("gone")
    assert objects.modified("gone") is None


def test_the_time_of_an_object_is_unknown_where_it_cannot_be_asked(objects: RemoteObjects):
    assert objects.modified("top") is not None
    FaultyFileSystem.plans["modified"] = itertools.repeat(OSError("500"))
    assert objects.modified("top") is None


@pytest.mark.parametrize("method", ["write", "write_all"])
def test_a_missing_bucket_is_named_by_the_first_write_and_asked_once(method: str):
    objects = open_objects("faulty://other/caches")
    with pytest.raises(RemoteError) as raised:
        objects.write("a", b"x") if method == "write" else objects.write_all({"a": b"x"})
    assert str(raised.value) == (
        "faulty://other/caches/a cannot be written: no such bucket (The specified bucket does not exist)"
    )
    assert len(called("pipe")) == 1
    assert not objects.exists("a")
    assert objects.files("") == []


def test_many_objects_arrive_whole_whichever_requests_fail(objects: RemoteObjects):
    generator = random.Random(3)
    FaultyFileSystem.plans["pipe"] = (OSError("503") if generator.random() < 0.3 else None for _ in itertools.count())
    wanted = {f"many/{number}": bytes([number]) * number for number in range(100)}
    objects.write_all(wanted)
    assert {name: objects.read(name) for name in objects.sizes("many")} == wanted
    assert len(called("pipe")) > 110


def test_one_object_that_cannot_be_written_is_an_error_of_them_all(objects: RemoteObjects):
    def fails(operation: str, path: str, *_: Any) -> None:
        if path.endswith("/3"):
            raise OSError("500")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FaultyFileSystem, "request", lambda self, *call: fails(*call))
        with pytest.raises(RemoteError, match="many/3: cannot write after 7 attempts"):
            objects.write_all({f"many/{number}": b"x" for number in range(8)})
    assert not objects.exists("many/3")


@pytest.mark.parametrize("num_bytes", [0, 9, 10, 11, 25])
@pytest.mark.parametrize("make", [tempfile.TemporaryFile, functools.partial(tempfile.SpooledTemporaryFile, 100)])
def test_a_file_is_written_whole_whether_it_is_held_or_goes_over_from_where_it_lies(
    make: Callable[[], Any], num_bytes: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("coldstill.cache.remote_objects.LARGE_BYTES", 10)
    objects = open_objects(f"memory://{uuid4().hex}")
    data = bytes(range(num_bytes))
    with make() as file:
        file.write(data)
        file.seek(0)
        objects.write_file("table", file)
    assert objects.read("table") == data
