import json
from collections.abc import Callable
from pathlib import Path

import pytest

from coldstill.cache.columns import ArraySpec, Column
from coldstill.cache.errors import CorruptError
from coldstill.cache.local_objects import PARTIAL_FOLDER, LocalObjects
from coldstill.cache.manifest import CommitRecord, Manifest, parse_record_name, record_name
from coldstill.cache.processes import process_token
from coldstill.cache.store import Store

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


def suffixes(store: Store) -> list[str]:
    return sorted(file.suffix for file in commit_files(store))


def test_nothing_exists_in_a_new_store(store: Store):
    manifest = Manifest(store)
    assert ("s0", "tokens") not in manifest
    assert manifest.columns() == []
    assert list(manifest.shards("tokens")) == []
    assert list(manifest.records()) == []
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
            with pytest.raises(KeyError):
                view.record(*key)


def test_files_of_a_column_without_its_record_are_no_column(store: Store):
    store.objects.write("arrays.zarr/shards/s0/tokens/values/c.0", b"data")
    assert ("s0", "tokens") not in Manifest(store)


def test_columns_shards_and_records_are_all_that_was_committed_in_order(store: Store):
    manifest = Manifest(store)
    commit_all(manifest)
    for view in (manifest, Manifest(store)):
        assert view.columns() == ["hidden/12/int8", "output_head", "tokens"]
        assert sorted(view.shards("tokens")) == ["s0", "s1"]
        assert list(view.shards("output_head")) == ["constants"]
        assert list(view.shards("logits")) == []
        assert [(record.shard, record.column.name) for record in view.records()] == sorted(KEYS)


def test_stored_bytes_are_those_of_all_objects():
    assert record_of("s0", "tokens", 10).stored_bytes == 117


@pytest.mark.parametrize("key", KEYS, ids="/".join)
def test_a_record_survives_its_line_and_its_name(key: tuple[str, str]):
    assert CommitRecord.from_line(json.loads(json.dumps(record_of(*key).to_line()))) == record_of(*key)
    assert parse_record_name(record_name(*key)) == key


def test_a_manifest_of_some_columns_knows_of_no_others(store: Store):
    commit_all(Manifest(store))
    Manifest(store).compact()
    Manifest(store).commit(record_of("s2", "tokens", 9))
    Manifest(store).commit(record_of("s2", "hidden/1", 9))
    some = Manifest(store, columns=["tokens", "absent", "tokens"])
    assert some.columns() == ["tokens"]
    assert sorted(some.shards("tokens")) == ["s0", "s1", "s2"]
    assert some.record("s1", "tokens") == record_of("s1", "tokens", 0)
    assert some.record("s2", "tokens") == record_of("s2", "tokens", 9)
    assert ("s0", "hidden/12/int8") not in some
    assert Manifest(store, columns=[]).columns() == []


def test_a_manifest_of_some_columns_compacts_nothing_away(store: Store):
    commit_all(Manifest(store))
    with pytest.raises(ValueError, match="a manifest of some columns cannot rewrite the records"):
        Manifest(store, columns=["tokens"]).compact()
    assert_holds_all(Manifest(store))


def test_a_manifest_of_some_columns_drops_no_others(store: Store):
    commit_all(Manifest(store))
    with pytest.raises(ValueError, match="a manifest of some columns"):
        Manifest(store, columns=["tokens"]).drop([("s1", "tokens")])
    assert_holds_all(Manifest(store))


def test_a_compaction_keeps_every_record_in_one_file(store: Store):
    manifest = Manifest(store)
    commit_all(manifest)
    assert len(commit_files(store)) == len(KEYS)
    manifest.compact()
    assert suffixes(store) == [".parquet"]
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


@pytest.mark.parametrize("fold_every", [1, 2, 3, 4, 5])
def test_compacted_records_are_the_same_bytes_in_any_order_of_commits(store: Store, tree, monkeypatch, fold_every: int):
    commit_all(Manifest(store))
    Manifest(store).compact()
    before = tree(store.path)
    for file in commit_files(store):
        file.unlink()
    monkeypatch.setattr("coldstill.cache.manifest.FOLD_EVERY", fold_every)
    manifest = Manifest(store)
    for number, key in reversed(list(enumerate(KEYS))):
        manifest.commit(record_of(*key, number))
    manifest.compact()
    assert tree(store.path) == before


def test_no_records_need_no_compaction(store: Store, tree):
    before = tree(store.path)
    Manifest(store).compact()
    assert tree(store.path) == before


def test_loose_records_are_folded_every_so_often(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("coldstill.cache.manifest.FOLD_EVERY", 3)
    manifest = Manifest(store)
    shapes = []
    for number in range(8):
        manifest.commit(record_of(f"s{number}", "tokens", number))
        shapes.append(suffixes(store))
        for view in (manifest, Manifest(store)):
            assert sorted(view.shards("tokens")) == [f"s{index}" for index in range(number + 1)]
            assert view.record(f"s{number}", "tokens") == record_of(f"s{number}", "tokens", number)
    loose, folded = ".json", ".parquet"
    assert shapes[:3] == [[loose], [loose, loose], [folded]]
    assert shapes[5] == [folded, folded]
    assert shapes[7] == [loose, loose, folded, folded]
    manifest.compact()
    assert suffixes(store) == [folded]
    assert [record.num_tokens for record in Manifest(store).records()] == list(range(8))


def test_a_process_folds_only_its_own_records(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("coldstill.cache.manifest.FOLD_EVERY", 2)
    first, second = Manifest(store), Manifest(store)
    second.commit(record_of("s9", "tokens"))
    first.commit(record_of("s0", "tokens"))
    first.commit(record_of("s1", "tokens"))
    assert suffixes(store) == [".json", ".parquet"]
    assert sorted(Manifest(store).shards("tokens")) == ["s0", "s1", "s9"]


def test_a_death_within_a_fold_loses_no_record_and_leaves_no_trace(store: Store, tree, monkeypatch):
    commit_all(Manifest(store))
    loose = {file: file.read_bytes() for file in commit_files(store)}
    Manifest(store).compact()
    expected = tree(store.path)
    for file in list(loose)[1:]:
        file.write_bytes(loose[file])  # the union was published, and some of what it came from is still there
    assert_holds_all(Manifest(store))
    assert len(list(Manifest(store).records())) == len(KEYS)
    Manifest(store).compact()
    assert tree(store.path) == expected


def test_two_folds_that_share_records_compact_to_each_record_once(store: Store, tree):
    commit_all(Manifest(store))
    Manifest(store).compact()
    expected = tree(store.path)
    (whole,) = commit_files(store)
    data = whole.read_bytes()
    whole.unlink()
    for number, key in list(enumerate(KEYS))[1:3]:
        Manifest(store).commit(record_of(*key, number))
    Manifest(store).compact()
    whole.write_bytes(data)
    assert suffixes(store) == [".parquet", ".parquet"]
    assert_holds_all(Manifest(store))
    Manifest(store).compact()
    assert tree(store.path) == expected


@pytest.mark.parametrize("is_compacted", [False, True], ids=["loose", "compacted"])
def test_what_is_dropped_is_gone_and_the_rest_stays(store: Store, is_compacted: bool):
    manifest = Manifest(store)
    commit_all(manifest)
    if is_compacted:
        manifest.compact()
    manifest.drop([KEYS[1], ("s7", "never there")])
    for view in (manifest, Manifest(store)):
        assert KEYS[1] not in view
        assert [(record.shard, record.column.name) for record in view.records()] == sorted({*KEYS} - {KEYS[1]})
    assert suffixes(store) == [".parquet"]
    manifest.commit(record_of(*KEYS[1], 1))
    assert_holds_all(Manifest(store))


def test_dropping_and_committing_again_ends_in_the_same_bytes(store: Store, tree):
    manifest = Manifest(store)
    commit_all(manifest)
    manifest.compact()
    expected = tree(store.path)
    manifest.drop([KEYS[0], KEYS[3]])
    manifest.commit(record_of(*KEYS[3], 3))
    manifest.commit(record_of(*KEYS[0], 0))
    manifest.compact()
    assert tree(store.path) == expected


def test_everything_can_be_dropped(store: Store):
    manifest = Manifest(store)
    commit_all(manifest)
    manifest.drop(KEYS)
    assert manifest.columns() == Manifest(store).columns() == []
    manifest.commit(record_of("s0", "tokens"))
    manifest.compact()
    assert list(Manifest(store).shards("tokens")) == ["s0"]


def test_a_drop_that_dies_before_it_is_published_drops_nothing(store: Store, monkeypatch: pytest.MonkeyPatch):
    manifest = Manifest(store)
    commit_all(manifest)

    def disk_is_full(*_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", disk_is_full)
        with pytest.raises(OSError, match="No space left"):
            manifest.drop([KEYS[0]])
    assert_holds_all(Manifest(store))


def test_two_manifests_see_each_others_commits_after_a_reload(store: Store):
    first, second = Manifest(store), Manifest(store)
    first.commit(record_of("s0", "tokens"))
    second.commit(record_of("s1", "tokens"))
    assert ("s1", "tokens") not in first
    assert ("s0", "tokens") not in second
    first.reload()
    for view in (first, Manifest(store)):
        assert ("s0", "tokens") in view
        assert ("s1", "tokens") in view


def test_a_published_record_is_known_to_be_out_whoever_published_it(store: Store):
    first, second = Manifest(store), Manifest(store)
    first.commit(record_of("s0", "hidden/1"))
    assert second.is_published("s0", "hidden/1")
    assert not second.is_published("s0", "hidden")
    first.compact()
    assert first.is_published("s0", "hidden/1")


def test_a_compaction_keeps_and_folds_what_another_process_committed_meanwhile(store: Store):
    first, second = Manifest(store), Manifest(store)
    commit_all(first)
    second.commit(record_of("s2", "tokens"))
    first.compact()
    assert suffixes(store) == [".parquet"]
    assert ("s2", "tokens") in first
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

    def files(self, folder: str) -> list[str]:
        names = super().files(folder)
        self._disturb()
        return names


def test_a_reader_that_lists_before_a_compaction_and_reads_after_it_sees_every_record(store: Store):
    commit_all(Manifest(store))
    compactions = iter([Manifest(store).compact])
    objects = DisturbedListing(store.path, lambda: next(compactions, lambda: None)())
    assert_holds_all(Manifest(Store(objects, store.teacher)))
    assert suffixes(store) == [".parquet"]


def test_records_that_never_stay_are_an_error_rather_than_an_empty_store(store: Store):
    manifest = Manifest(store)
    commit_all(manifest)

    def rewrite() -> None:
        for file in commit_files(store):
            file.rename(file.with_stem(file.stem + "x"))

    with pytest.raises(CorruptError, match=r"/commits changes faster than it can be read") as caught:
        Manifest(Store(DisturbedListing(store.path, rewrite), store.teacher))
    assert store.path in str(caught.value)


@pytest.mark.parametrize("field", ["shard", "column", "spec", "num_tokens", "num_rows", "objects", "check"])
def test_an_altered_record_is_corrupt_by_name(store: Store, field: str):
    Manifest(store).commit(record_of("s0", "tokens"))
    (file,) = commit_files(store)
    line = json.loads(file.read_text())
    line[field] = line[field] + 1 if isinstance(line[field], int) else line[field][:-1] + " "
    file.write_text(json.dumps(line))
    with pytest.raises(CorruptError, match=r"commits/s0~tokens\.json of store .* is corrupt: .*checksum"):
        Manifest(store)


def test_a_record_under_the_name_of_another_is_corrupt(store: Store):
    Manifest(store).commit(record_of("s0", "tokens"))
    (file,) = commit_files(store)
    file.rename(file.with_name("s1~tokens.json"))
    with pytest.raises(CorruptError, match=r"s1~tokens\.json of store .* it is the record of another column or shard"):
        Manifest(store)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[]", b"null", b"5", b'"x"', b'{"shard": "s0"}'])
def test_a_record_that_is_no_record_is_corrupt_by_file(store: Store, data: bytes):
    Manifest(store).commit(record_of("s0", "tokens"))
    (file,) = commit_files(store)
    file.write_bytes(data)
    with pytest.raises(
        CorruptError, match=r"commits/s0~tokens\.json of store .* is corrupt: .*; run: coldstill cache repair"
    ):
        Manifest(store)


def test_a_byte_flipped_in_any_file_of_records_is_corrupt_or_the_same_record(store: Store):
    manifest = Manifest(store)
    for number, key in enumerate(KEYS):
        manifest.commit(record_of(*key, number))
        if number == 2:
            manifest.compact()
    assert suffixes(store) == [".json", ".parquet"]
    for file in commit_files(store):
        data = file.read_bytes()
        num_refused = 0
        positions = range(0, len(data), 7)
        for position in positions:
            file.write_bytes(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
            try:
                assert_holds_all(Manifest(store))
            except CorruptError:
                num_refused += 1
        file.write_bytes(data)
        assert num_refused == len(positions) if file.suffix == ".parquet" else num_refused > len(positions) // 2
    assert_holds_all(Manifest(store))


def test_damaged_files_are_named_and_left_out_where_that_is_asked_for(store: Store):
    manifest = Manifest(store)
    for number, key in enumerate(KEYS[:2]):
        manifest.commit(record_of(*key, number))
    manifest.compact()
    for number, key in list(enumerate(KEYS))[2:]:
        manifest.commit(record_of(*key, number))
    (folded,) = (file for file in commit_files(store) if file.suffix == ".parquet")
    folded.write_bytes(folded.read_bytes()[:-1])
    Path(store.path, "commits", "s0~tokens.json").write_text("{")
    damaged: list[str] = []
    view = Manifest(store, damaged=damaged)
    assert sorted(damaged) == sorted([folded.name, "s0~tokens.json"])
    assert [(record.shard, record.column.name) for record in view.records()] == [KEYS[3]]


def test_no_file_is_damaged_in_a_whole_store(store: Store):
    commit_all(Manifest(store))
    damaged: list[str] = []
    assert_holds_all(Manifest(store, damaged=damaged))
    assert damaged == []


def test_a_partial_record_of_a_killed_writer_is_no_record(store: Store):
    Manifest(store).commit(record_of("s0", "tokens"))
    (file,) = commit_files(store)
    file.rename(Path(store.path, PARTIAL_FOLDER, f"{process_token()}.0123"))
    assert ("s0", "tokens") not in Manifest(store)
