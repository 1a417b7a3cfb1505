import json
from pathlib import Path
from uuid import uuid4

import pytest
import zarr

from cache.errors import FormatError, StoreNotFoundError
from cache.objects import open_objects
from cache.store import CONSTANTS, Store, create_store, ensure_group, open_store, shard_folder, store_path


@pytest.fixture(params=["local", "remote"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "caches") if request.param == "local" else f"memory://{uuid4().hex}/caches"


def edit(store: Store, text: str) -> None:
    Path(store.path, "arrays.zarr/zarr.json").write_text(text)


def test_a_store_lies_below_its_root_under_its_fingerprint(root: str, teacher: dict):
    store = create_store(root, teacher)
    assert store.path == store_path(root, store.name)
    assert store_path(root + "/", store.name) == store.path


def test_a_created_store_opens_with_its_teacher(root: str, teacher: dict):
    store = create_store(root, teacher)
    opened = open_store(store.path)
    assert opened.teacher == store.teacher == teacher
    assert (opened.name, opened.path) == (store.name, store.path)


def test_creating_a_store_again_opens_it_and_writes_nothing(store: Store, teacher: dict, tmp_path: Path, tree):
    before = tree(tmp_path)
    again = create_store(str(tmp_path / "caches"), teacher)
    assert (again.name, again.path, dict(again.teacher)) == (store.name, store.path, teacher)
    assert tree(tmp_path) == before


def test_facts_beside_the_identity_do_not_make_another_store(root: str, teacher: dict):
    store = create_store(root, teacher)
    again = create_store(root, {**teacher, "model": "a copy of it"})
    assert again.path == store.path
    assert again.teacher["model"] == "some/teacher"


def test_another_teacher_has_another_store(root: str, teacher: dict):
    other = {"identity": {**teacher["identity"], "dtype": "bfloat16"}}
    assert create_store(root, other).path != create_store(root, teacher).path


def test_a_new_store_is_a_zarr_hierarchy(store: Store):
    group = zarr.open_group(f"{store.path}/arrays.zarr", mode="r")
    assert sorted(name for name, _ in group.groups()) == ["constants", "shards"]
    assert group.attrs["coldstill"]["teacher"]["model"] == "some/teacher"


def test_no_store_is_not_found(root: str):
    with pytest.raises(StoreNotFoundError, match=r"no store at .*nowhere; run: coldstill precompute"):
        open_store(f"{root}/nowhere")


def test_a_store_cut_off_before_its_root_metadata_was_never_created(store: Store, teacher: dict, tmp_path: Path):
    Path(store.path, "arrays.zarr/zarr.json").unlink()
    with pytest.raises(StoreNotFoundError, match="no store at"):
        open_store(store.path)
    assert create_store(str(tmp_path / "caches"), teacher).path == store.path
    assert open_store(store.path).teacher == teacher


@pytest.mark.parametrize("version", [0, 2, "1"])
def test_another_format_is_refused_in_words(store: Store, teacher: dict, tmp_path: Path, version: object):
    attributes = {"coldstill": {"format": version, "teacher": teacher}}
    edit(store, json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}))
    message = f"has format {version}, this version of Coldstill reads format 1"
    with pytest.raises(FormatError, match=message) as caught:
        open_store(store.path)
    assert store.path in str(caught.value)
    with pytest.raises(FormatError, match=message):
        create_store(str(tmp_path / "caches"), teacher)


@pytest.mark.parametrize(
    "text",
    ["", "{", "not json", "{}", '{"attributes": {}}', '{"zarr_format": 3, "attributes": {"other": 1}}'],
    ids=["empty", "cut short", "no json", "no attributes", "no namespace", "another's"],
)
def test_garbage_metadata_is_not_a_store(store: Store, text: str):
    edit(store, text)
    with pytest.raises(
        FormatError, match=r"arrays\.zarr/zarr\.json is not the metadata of a Coldstill store"
    ) as caught:
        open_store(store.path)
    assert store.path in str(caught.value)


def test_constants_lie_beside_the_shards():
    assert shard_folder("s0") == "arrays.zarr/shards/s0"
    assert shard_folder(CONSTANTS) == "arrays.zarr/constants"


def test_a_group_that_is_there_keeps_its_attributes(tmp_path: Path):
    objects = open_objects(tmp_path)
    ensure_group(objects, "folder", {"block": 1})
    ensure_group(objects, "folder", {"block": 2})
    assert dict(zarr.open_group(tmp_path / "folder", mode="r").attrs) == {"block": 1}
