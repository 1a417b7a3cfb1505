from pathlib import Path
from uuid import uuid4

import pytest

from coldstill.cache.errors import CorruptError, StoreNotFoundError
from coldstill.cache.index import read_entry, write_entry
from coldstill.cache.inventory import list_stores
from coldstill.cache.store import open_store
from coldstill.pipeline.verify import verify

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
    [b"", b"{", b"\xff\xfe", b"[]", b"null", b"5", b'"text"', b'{"key": 1}', b'{"value": 3}'],
    ids=["empty", "cut short", "no text", "list", "null", "number", "text", "no value", "no key"],
)
def test_a_damaged_entry_is_corrupt_by_name(tmp_path: Path, data: bytes):
    write_entry(str(tmp_path), "rows", KEY, {"store": "abc"})
    (file,) = (tmp_path / "index").iterdir()
    file.write_bytes(data)
    with pytest.raises(CorruptError, match="is corrupt; run: coldstill precompute") as caught:
        read_entry(str(tmp_path), "rows", KEY)
    assert f"index/{file.name}" in str(caught.value)


def test_an_altered_entry_is_never_another_entry(tmp_path: Path):
    write_entry(str(tmp_path), "rows", KEY, {"store": "abc"})
    (file,) = (tmp_path / "index").iterdir()
    good = file.read_bytes()
    num_refused = 0
    for position in range(len(good)):
        file.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        try:
            assert read_entry(str(tmp_path), "rows", KEY) == {"store": "abc"}
        except CorruptError:
            num_refused += 1
    assert num_refused > len(good) // 2


def test_an_entry_under_the_name_of_another_is_corrupt(tmp_path: Path):
    write_entry(str(tmp_path), "rows", KEY, {"store": "abc"})
    (file,) = (tmp_path / "index").iterdir()
    other = {"teacher": "another"}
    write_entry(str(tmp_path), "rows", other, {"store": "def"})
    (taken,) = (path for path in (tmp_path / "index").iterdir() if path != file)
    taken.write_bytes(file.read_bytes())
    with pytest.raises(CorruptError, match="is corrupt; run: coldstill precompute"):
        read_entry(str(tmp_path), "rows", other)


def test_what_a_root_has_instead_is_said_with_what_differs(root: str):
    write_entry(root, "rows", {"teacher": {"path": "x"}, "data": {"rows": 7, "packing": True}}, {"store": "abc"})
    write_entry(root, "rows", {"teacher": {"path": "some"}, "data": {"rows": 100, "packing": False}}, {"store": "abc"})
    with pytest.raises(StoreNotFoundError) as refused:
        read_entry(root, "rows", {"teacher": {"path": "some"}, "data": {"rows": 200, "packing": False, "eos": True}})
    assert str(refused.value) == (
        f"{root} holds no rows for this recipe's teacher and data sections (the nearest there: data.rows 100 there, "
        "200 here, data.eos not given there, true here); run: coldstill precompute"
    )


def test_where_nothing_like_it_is_that_is_said_too(root: str):
    with pytest.raises(StoreNotFoundError, match=r"\(nothing is there\)"):
        read_entry(root, "rows", KEY)
    write_entry(root, "rows", KEY, {"store": "abc"})
    with pytest.raises(StoreNotFoundError, match=r"no student for .*teacher and data sections \(nor any other\)"):
        read_entry(root, "student", KEY)


def test_damaged_entries_are_nothing_to_compare_with(tmp_path: Path):
    write_entry(str(tmp_path), "rows", KEY, {"store": "abc"})
    (file,) = (tmp_path / "index").iterdir()
    file.write_bytes(b"[")
    with pytest.raises(StoreNotFoundError, match=r"\(nor any other\)"):
        read_entry(str(tmp_path), "rows", {"teacher": "another"})


def test_a_root_is_named_so_that_it_can_be_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreNotFoundError, match=f"^{tmp_path}/caches holds no rows"):
        read_entry("caches", "rows", KEY)
    for look in (lambda: open_store("caches/stores/x"), lambda: list_stores("caches"), lambda: verify("caches")):
        with pytest.raises(StoreNotFoundError, match=f"^no store (in|at) {tmp_path}/caches"):
            look()
