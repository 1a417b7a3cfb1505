import json
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest
import zarr

from coldstill.cache.errors import CorruptError, FormatError, StoreNotFoundError
from coldstill.cache.identity import digest_of
from coldstill.cache.objects import open_objects
from coldstill.cache.store import (
    CONSTANTS,
    FORMAT_VERSION,
    Store,
    create_store,
    group_metadata,
    missing_groups,
    open_store,
    parent_groups,
    shard_folder,
    store_path,
)


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


REDO = "run precompute with another cache root, or remove it with coldstill cache rm and run precompute again$"


@dataclass(frozen=True)
class OtherFormat:
    id: str
    version: int
    message: str


@pytest.mark.parametrize(
    "other",
    [
        OtherFormat(
            "first", 1, "has format 1, an older one than format 3, which this version of Coldstill reads; " + REDO
        ),
        OtherFormat(
            "second", 2, "has format 2, an older one than format 3, which this version of Coldstill reads; " + REDO
        ),
        OtherFormat("newer", 4, "has format 4, a newer one than format 3, .*; install a newer Coldstill$"),
    ],
    ids=lambda other: other.id,
)
def test_another_format_is_refused_in_words(store: Store, teacher: dict, tmp_path: Path, other: OtherFormat):
    assert FORMAT_VERSION == 3
    said = {"format": other.version, "teacher": teacher}
    # The first format had no check.
    attributes = {"coldstill": said if other.version == 1 else {**said, "check": digest_of(said)}}
    edit(store, json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}))
    with pytest.raises(FormatError, match=other.message) as caught:
        open_store(store.path)
    assert store.path in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(FormatError, match=other.message):
        create_store(str(tmp_path / "caches"), teacher)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "not json",
        "{}",
        "[]",
        "5",
        '"x"',
        '{"attributes": {}}',
        '{"attributes": []}',
        '{"attributes": null}',
        '{"zarr_format": 3, "attributes": {"other": 1}}',
        '{"attributes": {"coldstill": {"format": 3}}}',
        '{"attributes": {"coldstill": {"format": "3", "teacher": {}, "check": ""}}}',
        '{"attributes": {"coldstill": {"format": 3, "teacher": [], "check": 3}}}',
    ],
)
def test_garbage_metadata_is_a_corrupt_store(store: Store, teacher: dict, tmp_path: Path, text: str):
    edit(store, text)
    message = r"arrays\.zarr/zarr\.json is corrupt: it is not what was written; run: coldstill cache repair"
    with pytest.raises(CorruptError, match=message) as caught:
        open_store(store.path)
    assert store.path in str(caught.value)
    with pytest.raises(CorruptError, match=message):
        create_store(str(tmp_path / "caches"), teacher)


def test_a_store_of_the_second_format_with_altered_facts_is_corrupt(store: Store, teacher: dict):
    said = {"format": 2, "teacher": teacher}
    altered = {**said, "teacher": {**teacher, "model": "some/other"}, "check": digest_of(said)}
    edit(store, json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {"coldstill": altered}}))
    with pytest.raises(CorruptError, match="it is not what was written"):
        open_store(store.path)


def test_altered_facts_of_the_teacher_are_corrupt(store: Store, teacher: dict):
    text = Path(store.path, "arrays.zarr/zarr.json").read_text()
    edit(store, text.replace("some/teacher", "some/other"))
    with pytest.raises(CorruptError, match="it is not what was written"):
        open_store(store.path)


def test_the_metadata_of_another_teachers_store_is_corrupt(store: Store, teacher: dict):
    facts = {"identity": {**teacher["identity"], "weights": "w1"}}
    content = {"format": 3, "teacher": facts, "check": digest_of(facts)}
    edit(store, json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {"coldstill": content}}))
    with pytest.raises(CorruptError, match="it is not what was written"):
        open_store(store.path)


def test_a_store_at_a_file_url_is_that_of_the_folder(teacher: dict, tmp_path: Path):
    store = create_store(f"file://{tmp_path}/caches", teacher)
    assert store.path == str(tmp_path / "caches" / "stores" / store.name)
    assert open_store(f"file://{store.path}").teacher == teacher
    assert create_store(str(tmp_path / "caches"), teacher).path == store.path


def test_constants_lie_beside_the_shards():
    assert shard_folder("s0") == "arrays.zarr/shards/s0"
    assert shard_folder(CONSTANTS) == "arrays.zarr/constants"


def test_a_group_that_is_there_keeps_its_attributes(tmp_path: Path):
    objects = open_objects(tmp_path)
    objects.write("folder/zarr.json", group_metadata({"block": 1}))
    missing = missing_groups(objects, ["folder", "other/inner"])
    assert list(missing) == ["other/inner/zarr.json"]
    objects.write_all(missing)
    assert missing_groups(objects, ["folder", "other/inner"]) == {}
    assert dict(zarr.open_group(tmp_path / "folder", mode="r").attrs) == {"block": 1}
    assert dict(zarr.open_group(tmp_path / "other/inner", mode="r").attrs) == {}


def test_every_folder_from_the_shard_to_the_column_is_a_group():
    shard = "arrays.zarr/shards/s0"
    assert parent_groups("s0", "tokens") == [shard]
    assert parent_groups("s0", "hidden/12/int8") == [shard, f"{shard}/hidden", f"{shard}/hidden/12"]
    assert parent_groups(CONSTANTS, "output_head") == ["arrays.zarr/constants"]
