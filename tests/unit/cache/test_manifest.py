import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cache.columns import ArraySpec, Column
from cache.errors import CorruptError
from cache.manifest import CommitRecord, Manifest
from cache.objects import LocalObjects
from cache.store import Store

KEYS = [("s1", "tokens"), ("s0", "hidden/12/int8"), ("s0", "tokens"), ("constants", "output_head")]


def record_of(shard: str, column: str, num_tokens: int = 10) -> CommitRecord:
    objects = {"values": {"bytes": 100 + num_tokens, "sha256": "9c41"}, "scale": {"bytes": 7, "sha256": "77ab"}}
    arrays = {"values": ArraySpec("int8", (3,)), "scale": ArraySpec("float32", (1,), "shard")}
    return CommitRecord(shard, Column(column, arrays, {"block": 12}), num_tokens, 2, objects)


def commit_all(manifest: Manifest) -> None:
    for number, key in enumerate(KEYS):
        manifest.commit(record_of(*key, number))


def assert_holds_all(manifest: Manifest) -> None:
    assert [manifest.record(*key) for key in KEYS] == [record_of(*key, number) for number, key in enumerate(KEYS)]


def commit_files(store: Store) -> list[Path]:
    return sorted(Path(store.path, "commits").iterdir())


def test_nothing_exists_in_a_new_store(store: Store):
    manifest = Manifest(store)
    assert ("s0", "tokens") not in manifest
    assert manifest.columns("s0") == []
    with pytest.raises(KeyError):
        manifest.record("s0", "tokens")


def test_only_what_is_committed_exists(store: Store):
    manifest = Manifest(store)
    manifest.commit(record_of("s0", "hidden/12"))
    for view in (manifest, Manifest(store)):
        assert ("s0", "hidden/12") in view
        assert view.record("s0", "hidden/12") == record_of("s0", "hidden/12")
        for key in [("s0", "hidden/1"), ("s0", "hidden"), ("s1", "hidden/12")]:
            assert key not in view


def test_files_of_a_column_without_its_record_are_no_column(store: Store):
    store.objects.write("arrays.zarr/shards/s0/tokens/values/c/0", b"data")
    assert ("s0", "tokens") not in Manifest(store)


def test_the_columns_of_a_shard_are_sorted(store: Store):
    manifest = Manifest(store)
    commit_all(manifest)
    assert manifest.columns("s0") == ["hidden/12/int8", "tokens"]
    assert manifest.columns("s1") == ["tokens"]


def test_stored_bytes_are_those_of_all_objects():
    assert record_of("s0", "tokens", 10).stored_bytes == 117


def test_a_compaction_keeps_every_record_in_one_file(store: Store):
    manifest = Manifest(store)
    commit_all(manifest)
    assert len(commit_files(store)) == len(KEYS)
    manifest.compact()
    assert [file.suffix for file in commit_files(store)] == [".parquet"]
    assert_holds_all(manifest)
    assert_holds_all(Manifest(store))


def test_records_before_and_after_a_compaction_count(store: Store):
    manifest = Manifest(store)
    commit_all(manifest)
    manifest.compact()
    manifest.commit(record_of("s2", "tokens"))
    reopened = Manifest(store)
    assert_holds_all(reopened)
    assert ("s2", "tokens") in reopened
    reopened.compact()
    assert len(commit_files(store)) == 1
    assert_holds_all(Manifest(store))
    assert ("s2", "tokens") in Manifest(store)


def test_compacting_again_changes_nothing(store: Store, tree):
    manifest = Manifest(store)
    commit_all(manifest)
    manifest.compact()
    before = tree(store.path)
    manifest.compact()
    Manifest(store).compact()
    assert tree(store.path) == before


def test_compacted_records_are_the_same_bytes_in_any_order_of_commits(store: Store, tree):
    commit_all(Manifest(store))
    Manifest(store).compact()
    before = tree(store.path)
    for file in commit_files(store):
        file.unlink()
    manifest = Manifest(store)
    for number, key in reversed(list(enumerate(KEYS))):
        manifest.commit(record_of(*key, number))
    manifest.compact()
    assert tree(store.path) == before


def test_one_record_needs_no_compaction(store: Store, tree):
    manifest = Manifest(store)
    manifest.commit(record_of("s0", "tokens"))
    before = tree(store.path)
    manifest.compact()
    assert tree(store.path) == before


def test_two_manifests_see_each_others_commits_after_a_reload(store: Store):
    first, second = Manifest(store), Manifest(store)
    first.commit(record_of("s0", "tokens"))
    second.commit(record_of("s1", "tokens"))
    assert ("s1", "tokens") not in first
    assert ("s0", "tokens") not in second
    reloaded = Manifest(store)
    assert ("s0", "tokens") in reloaded
    assert ("s1", "tokens") in reloaded


def test_a_compaction_keeps_what_another_process_committed_meanwhile(store: Store):
    first, second = Manifest(store), Manifest(store)
    commit_all(first)
    second.commit(record_of("s2", "tokens"))
    first.compact()
    assert_holds_all(Manifest(store))
    assert ("s2", "tokens") in Manifest(store)


def test_two_compactions_of_the_same_records_keep_them(store: Store):
    commit_all(Manifest(store))
    first, second = Manifest(store), Manifest(store)
    first.compact()
    second.commit(record_of("s2", "tokens"))
    second.compact()
    assert_holds_all(Manifest(store))
    assert ("s2", "tokens") in Manifest(store)


class DisturbedListing(LocalObjects):
    """Objects where something happens between each listing and what follows it."""

    def __init__(self, root: str, disturb: Callable[[], None]) -> None:
        super().__init__(root)
        self._disturb = disturb

    def list(self, folder: str) -> list[str]:
        names = super().list(folder)
        self._disturb()
        return names


def test_a_reader_that_lists_before_a_compaction_and_reads_after_it_sees_every_record(store: Store):
    commit_all(Manifest(store))
    compactions = iter([Manifest(store).compact])
    objects = DisturbedListing(store.path, lambda: next(compactions, lambda: None)())
    assert_holds_all(Manifest(Store(objects, store.teacher)))
    assert [file.suffix for file in commit_files(store)] == [".parquet"]


def test_records_that_never_stay_are_an_error_rather_than_an_empty_store(store: Store):
    manifest = Manifest(store)
    commit_all(manifest)

    def rewrite() -> None:
        for file in commit_files(store):
            file.rename(file.with_stem(file.stem + "x"))

    with pytest.raises(CorruptError, match=r"the commit records of store .* change faster than they can be read"):
        Manifest(Store(DisturbedListing(store.path, rewrite), store.teacher))


@pytest.mark.parametrize("field", ["shard", "column", "spec", "body", "check"])
def test_an_altered_record_is_corrupt_by_name(store: Store, field: str):
    Manifest(store).commit(record_of("s0", "tokens"))
    (file,) = commit_files(store)
    line = json.loads(file.read_text())
    line[field] = line[field][:-1] + ("x" if field in ("shard", "column") else " ")
    file.write_text(json.dumps(line))
    manifest = Manifest(store)
    with pytest.raises(CorruptError, match=r"the commit record of column \w+, shard \w+, in .* is corrupt"):
        manifest.record(line["shard"], line["column"])


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[]", b"null", b'{"shard": "s0"}'])
def test_a_record_that_is_no_record_is_corrupt_by_file(store: Store, data: bytes):
    Manifest(store).commit(record_of("s0", "tokens"))
    (file,) = commit_files(store)
    file.write_bytes(data)
    with pytest.raises(
        CorruptError, match=r"commits/s0~tokens\.json of store .* is corrupt: .*; delete the store and run"
    ):
        Manifest(store)


def test_a_byte_flipped_in_compacted_records_is_never_another_record(store: Store):
    manifest = Manifest(store)
    commit_all(manifest)
    manifest.compact()
    (file,) = commit_files(store)
    data = file.read_bytes()
    for position in range(0, len(data), 7):
        file.write_bytes(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
        try:
            damaged = Manifest(store)
            found = [(number, damaged.record(*key)) for number, key in enumerate(KEYS) if key in damaged]
        except CorruptError:
            continue
        for number, record in found:
            assert record == record_of(*KEYS[number], number)


def test_a_partial_record_of_a_killed_writer_is_no_record(store: Store):
    Manifest(store).commit(record_of("s0", "tokens"))
    (file,) = commit_files(store)
    file.rename(file.with_name(f"{file.name}.0123.partial"))
    assert ("s0", "tokens") not in Manifest(store)
