"""Each thing that can be wrong below a root is a problem of its own kind, said in words; what a kill leaves is none."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bits import flip

from coldstill.cache.audit import audit_store, stored_bytes
from coldstill.cache.errors import StoreNotFoundError
from coldstill.cache.index import write_entry
from coldstill.cache.manifest import Manifest
from coldstill.cache.rows import publish_rows, read_rows, rows_of_shard
from coldstill.cache.selections import Selection
from coldstill.cache.store import CONSTANTS, Store
from coldstill.pipeline.verify import verify

MIXED = "hidden/12/mixed"


@dataclass(frozen=True)
class Filled:
    """A store with tokens and a column in two shards, a constant, a selection, an index entry and a student."""

    store: Store
    selection: Selection
    root: Path

    @property
    def path(self) -> Path:
        return Path(self.store.path)

    @property
    def shard(self) -> str:
        return sorted(self.selection.shard_names)[0]

    @property
    def column(self) -> Path:
        return self.path / "arrays.zarr/shards" / self.shard / MIXED


@pytest.fixture
def filled(store: Store, fill_store: Callable[..., Selection], tmp_path: Path) -> Filled:
    selection = fill_store()
    root = tmp_path / "caches"
    write_entry(str(root), "rows", "a recipe", {"store": store.name, "selections": {"train": selection.name}})
    student = root / "students/s0"
    student.mkdir(parents=True)
    (student / "config.json").write_text("{}")
    sums = {"config.json": hashlib.sha256(b"{}").hexdigest()}
    (student / "checksums.json").write_text(json.dumps(sums))
    write_entry(str(root), "student", "a recipe", {"folder": "s0"})
    return Filled(store, selection, root)


def only(folder: Path, pattern: str = "*") -> Path:
    (path,) = folder.glob(pattern)
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


@dataclass(frozen=True)
class Case:
    """A damage, and the problem that it is; `{shard}`, `{name}` and so on stand for what the store calls them."""

    damage: Callable[[Filled], None]
    kind: str
    file: str
    what: str
    column: str | None = None


IN_COLUMN = "stores/{name}/arrays.zarr/shards/{shard}/hidden/12/mixed"
OF_COLUMN = "column hidden/12/mixed, shard {shard}: "
CASES = {
    "array gone": Case(
        lambda filled: (filled.column / "ids/c.0").unlink(), "array", f"{IN_COLUMN}/ids/c.0",
        "column hidden/12/mixed, array ids, shard {shard}: its object is missing", MIXED,
    ),
    "array cut": Case(
        lambda filled: cut(filled.column / "scale/c.0"), "array", f"{IN_COLUMN}/scale/c.0",
        "column hidden/12/mixed, array scale, shard {shard}: its object has {size} bytes, expected {expected}", MIXED,
    ),
    "array flipped": Case(
        lambda filled: flip(filled.column / "values/c.0.0"), "array", f"{IN_COLUMN}/values/c.0.0",
        "column hidden/12/mixed, array values, shard {shard}: its object is not what was written", MIXED,
    ),
    "constant flipped": Case(
        lambda filled: flip(filled.path / "arrays.zarr/constants/output_head/weight/c.0.0"), "array",
        "stores/{name}/arrays.zarr/constants/output_head/weight/c.0.0",
        "column output_head, array weight, shard constants: its object is not what was written", "output_head",
    ),
    "array's metadata gone": Case(
        lambda filled: (filled.column / "ids/zarr.json").unlink(), "metadata", f"{IN_COLUMN}/ids/zarr.json",
        OF_COLUMN + "its Zarr metadata is missing", MIXED,
    ),
    "column's metadata flipped": Case(
        lambda filled: flip(filled.column / "zarr.json"), "metadata", f"{IN_COLUMN}/zarr.json",
        OF_COLUMN + "its Zarr metadata is not what was written", MIXED,
    ),
    "metadata of a folder of columns flipped": Case(
        lambda filled: flip(filled.column.parent / "zarr.json"), "metadata",
        "stores/{name}/arrays.zarr/shards/{shard}/hidden/12/zarr.json",
        OF_COLUMN + "its Zarr metadata is not what was written", MIXED,
    ),
    "shards' metadata gone": Case(
        lambda filled: (filled.path / "arrays.zarr/shards/zarr.json").unlink(), "metadata",
        "stores/{name}/arrays.zarr/shards/zarr.json", "its Zarr metadata is missing",
    ),
    "root metadata says another node type": Case(
        lambda filled: replace(filled.path / "arrays.zarr/zarr.json", '"group"', '"array"'), "metadata",
        "stores/{name}/arrays.zarr/zarr.json", "its Zarr metadata is not what was written",
    ),
    "record flipped": Case(
        lambda filled: flip(filled.path / "commits/constants~output_head.json"), "commits",
        "stores/{name}/commits/constants~output_head.json",
        "column output_head, shard constants: its commit record is not what was written",
    ),
    "record altered": Case(
        lambda filled: replace(filled.path / "commits/constants~output_head.json", '"num_rows": 0', '"num_rows": 1'),
        "commits", "stores/{name}/commits/constants~output_head.json",
        "column output_head, shard constants: its commit record is not what was written",
    ),
    "selection flipped": Case(
        lambda filled: flip(only(filled.path / "selections"), 60), "selection",
        "stores/{name}/selections/{selection}.parquet", "is not what was written",
    ),
    "rows flipped": Case(
        lambda filled: flip(only(filled.path / "rows"), 60), "rows", "stores/{name}/rows/{rows}",
        "is not what was written",
    ),
    "root metadata gone": Case(
        lambda filled: (filled.path / "arrays.zarr/zarr.json").unlink(), "store",
        "stores/{name}/arrays.zarr/zarr.json", "is missing, but the store holds data",
    ),
    "root metadata cut": Case(
        lambda filled: cut(filled.path / "arrays.zarr/zarr.json"), "store", "stores/{name}/arrays.zarr/zarr.json",
        "{path}/arrays.zarr/zarr.json is corrupt: it is not what was written; run: coldstill cache repair",
    ),
    "index entry flipped": Case(
        lambda filled: flip(only(filled.root / "index", "rows-*")), "index", "index/{entry}", "is not what was written",
    ),
    "student's file gone": Case(
        lambda filled: (filled.root / "students/s0/config.json").unlink(), "student", "students/s0",
        "config.json is missing",
    ),
    "student's file flipped": Case(
        lambda filled: flip(filled.root / "students/s0/config.json", 0), "student", "students/s0",
        "config.json is not what was written",
    ),
    "student's checksums cut": Case(
        lambda filled: cut(filled.root / "students/s0/checksums.json"), "student", "students/s0",
        "checksums.json is not what was written",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_thing_that_is_wrong_is_one_problem_that_says_what_and_where(filled: Filled, name: str):
    case = CASES[name]
    size = (filled.column / "scale/c.0").stat().st_size
    said = {
        "name": filled.store.name,
        "path": filled.path,
        "shard": filled.shard,
        "selection": filled.selection.name,
        "rows": only(filled.path / "rows").name,
        "entry": only(filled.root / "index", "rows-*").name,
        "size": size - 1,
        "expected": size,
    }
    case.damage(filled)
    audit = verify(str(filled.root), show_progress=False)
    assert not audit.is_clean
    found = [(f"stores/{filled.store.name}/", problem) for store in audit.stores for problem in store.problems]
    ((where, problem),) = [*found, *(("", problem) for problem in audit.problems)]
    assert problem.kind == case.kind
    assert where + problem.file == case.file.format(**said)
    assert problem.what == case.what.format(**said)
    assert problem.column == case.column
    of_constants = case.column == "output_head"
    assert problem.shard == (None if case.column is None else CONSTANTS if of_constants else filled.shard)


def test_a_folded_file_of_records_that_was_altered_is_a_problem_of_its_own(filled: Filled):
    Manifest(filled.store).compact()
    flip(only(filled.path / "commits"), 60)
    audit = audit_store(filled.store)
    problem = audit.problems[0]
    assert (problem.kind, problem.what) == ("commits", "the commit records in it are not what was written")
    assert audit.num_columns == 0
    assert audit.unfinished, "the arrays that lost their records"


def test_a_store_that_is_whole_is_clean_and_every_byte_of_it_was_read(filled: Filled, tree: Callable[..., Any]):
    before = tree(filled.root)
    told: list[int] = []
    audit = audit_store(filled.store, on_bytes=told.append)
    assert (audit.problems, audit.unfinished, audit.unlisted) == ([], [], [])
    objects = [data for name, data in before.items() if "/c" in name and name.rsplit("/", 1)[-1].startswith("c.")]
    assert audit.num_bytes == sum(told) == stored_bytes(filled.store) == sum(map(len, objects))
    assert audit.num_columns == 2 * 2 + 1
    assert verify(str(filled.root), show_progress=False).is_clean
    assert tree(filled.root) == before


def test_arrays_without_a_record_are_unfinished_and_no_problem(filled: Filled):
    record = filled.path / f"commits/{filled.shard}~hidden~12~mixed.json"
    record.unlink()
    audit = audit_store(filled.store)
    assert audit.problems == []
    folder = filled.column.relative_to(filled.path)
    assert {name for name in audit.unfinished if name.startswith(f"{folder}/")} == {
        str(path.relative_to(filled.path)) for path in filled.column.rglob("*") if path.is_file()
    }
    assert verify(str(filled.root), show_progress=False).is_clean


def test_shards_whose_rows_are_not_known_are_noted_and_no_problem(filled: Filled):
    only(filled.path / "rows").unlink()
    audit = audit_store(filled.store)
    assert audit.problems == []
    assert audit.unlisted == sorted(filled.selection.shard_names)


def test_rows_whose_tokens_are_not_committed_are_a_problem(filled: Filled):
    (filled.path / f"commits/{filled.shard}~tokens.json").unlink()
    (problem,) = audit_store(filled.store).problems
    count = read_rows(filled.store)["shard"].to_pylist().count(filled.shard)
    assert (problem.kind, problem.file, problem.shard, problem.column) == ("rows", "rows", filled.shard, "tokens")
    assert problem.what == (
        f"column tokens, shard {filled.shard}: {count} rows are known, but their tokens are not committed"
    )


def test_rows_that_are_not_those_of_their_tokens_are_a_problem(filled: Filled):
    only(filled.path / "rows").unlink()
    publish_rows(filled.store, rows_of_shard(filled.shard, np.frombuffer(b"0" * 16, "V16"), [4]))
    (problem,) = audit_store(filled.store).problems
    assert (problem.kind, problem.file, problem.shard) == ("rows", "rows", filled.shard)
    assert problem.what == (f"column tokens, shard {filled.shard}: its tokens are not those of the rows that are known")


def test_an_entry_that_leads_nowhere_is_a_problem(filled: Filled):
    only(filled.path / "selections").unlink()
    shutil.rmtree(filled.root / "students/s0")
    audit = verify(str(filled.root), show_progress=False)
    selection = f"stores/{filled.store.name}/selections/{filled.selection.name}.parquet"
    assert sorted((problem.kind, problem.what) for problem in audit.problems) == [
        ("index", f"leads to {selection}, which is not there"),
        ("index", "leads to students/s0/checksums.json, which is not there"),
    ]


def test_a_half_made_student_is_no_problem(filled: Filled):
    (filled.root / "students/.s1.somebody.partial").mkdir()
    assert verify(str(filled.root), show_progress=False).is_clean


def test_a_student_without_checksums_is_a_problem(filled: Filled):
    (filled.root / "students/s0/checksums.json").unlink()
    audit = verify(str(filled.root), show_progress=False)
    assert [problem.what for problem in audit.problems if problem.kind == "student"] == ["checksums.json is missing"]


def test_a_store_that_was_never_created_is_no_problem(filled: Filled):
    (filled.root / "stores/0123/arrays.zarr/shards").mkdir(parents=True)
    (filled.root / "stores/0123/arrays.zarr/shards/zarr.json").write_text("{}")
    audit = verify(str(filled.root), show_progress=False)
    assert audit.is_clean
    assert [store.path for store in audit.stores] == [filled.store.path]


def test_one_store_that_cannot_be_opened_does_not_hide_another(filled: Filled):
    other = filled.root / "stores/0123"
    shutil.copytree(filled.path, other)  # under another name than its teacher's fingerprint
    flip(filled.column / "values/c.0.0")
    audit = verify(str(filled.root), show_progress=False)
    assert [problem.kind for problem in audit.problems] == ["store"]
    assert [problem.kind for store in audit.stores for problem in store.problems] == ["array"]


def test_a_root_that_holds_nothing_is_refused(tmp_path: Path):
    with pytest.raises(StoreNotFoundError, match=f"no store in {tmp_path}; a root is what a recipe names as `cache`"):
        verify(str(tmp_path), show_progress=False)
