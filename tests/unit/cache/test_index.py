from pathlib import Path
from uuid import uuid4

import pytest

from cache.errors import CorruptError, StoreNotFoundError
from cache.index import read_entry, write_entry

KEY = {"teacher": "some/teacher", "data": {"rows": 100}}


@pytest.fixture(params=["local", "remote"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "caches") if request.param == "local" else f"memory://{uuid4().hex}/caches"


def test_an_entry_leads_to_what_was_written(root: str):
    write_entry(root, "rows", KEY, {"store": "abc", "selections": {"train": "s1"}})
    assert read_entry(root, "rows", KEY) == {"store": "abc", "selections": {"train": "s1"}}


def test_the_order_of_a_keys_parts_does_not_matter(root: str):
    write_entry(root, "rows", KEY, {"store": "abc"})
    assert read_entry(root, "rows", dict(reversed(KEY.items()))) == {"store": "abc"}


def test_a_second_entry_replaces_the_first(root: str):
    write_entry(root, "rows", KEY, {"store": "abc"})
    write_entry(root, "rows", KEY, {"store": "xyz"})
    assert read_entry(root, "rows", KEY) == {"store": "xyz"}


def test_kinds_and_keys_do_not_meet(root: str):
    write_entry(root, "rows", KEY, {"store": "abc"})
    write_entry(root, "student", KEY, {"path": "p"})
    write_entry(root, "rows", {**KEY, "data": {"rows": 101}}, {"store": "def"})
    assert read_entry(root, "rows", KEY) == {"store": "abc"}
    assert read_entry(root, "student", KEY) == {"path": "p"}


@pytest.mark.parametrize(("kind", "key"), [("student", KEY), ("rows", {"teacher": "another"})])
def test_what_was_never_written_is_said_to_need_precompute(root: str, kind: str, key: dict):
    write_entry(root, "rows", KEY, {"store": "abc"})
    with pytest.raises(StoreNotFoundError, match=f"holds no {kind} for this recipe's .*; run: coldstill precompute"):
        read_entry(root, kind, key)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe", b"[]", b"null", b'{"key": 1}', b'{"value": 3}'],
    ids=["empty", "cut short", "no text", "list", "null", "no value", "number"],
)
def test_a_damaged_entry_is_corrupt_by_name(tmp_path: Path, data: bytes):
    write_entry(str(tmp_path), "rows", KEY, {"store": "abc"})
    (file,) = (tmp_path / "index").iterdir()
    file.write_bytes(data)
    with pytest.raises(CorruptError, match="is corrupt; run: coldstill precompute") as caught:
        read_entry(str(tmp_path), "rows", KEY)
    assert f"index/{file.name}" in str(caught.value)
