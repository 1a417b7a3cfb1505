"""`cache verify --live`: what is stored beside its teacher, run again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldstill.cache.arrays import read_column
from coldstill.cache.inventory import list_stores, remove_column
from coldstill.cache.manifest import Manifest
from coldstill.cache.store import Store, open_store, store_path
from coldstill.cache.writer import write_column

TOPK, TAIL, FINAL = "logits/topk/16/delta", "logits/tail/16_8/1_2", "logits/final/coded_0.03"
SAMPLED = {"kind": "topk_sampled", "k": 16, "samples": 8, "temperatures": [1, 2]}
FORMS = {
    "int8": {"encoding": "int8"},
    "coded": {"encoding": "coded", "token_fraction": 0.5},
    "float16": {"encoding": "float16"},
}

Write = Callable[..., Path]
Run = Callable[..., Any]


@pytest.fixture
def root(workplace: Path) -> Path:
    return workplace / "caches"


def the_store(root: Path) -> Store:
    (name,) = list_stores(str(root))
    return open_store(store_path(str(root), name))


def tamper(store: Store, column: str, array: str, change: Callable[[np.ndarray], Any]) -> None:
    """Write a column again with other numbers, and checksums that fit them."""
    manifest = Manifest(store)
    records = [manifest.record(shard, column) for shard in manifest.shards(column)]
    values = [read_column(store, record) for record in records]
    remove_column(store, column)
    manifest = Manifest(store)
    for record, arrays in zip(records, values, strict=True):
        change(arrays[array])
        sizes = {"num_tokens": record.num_tokens, "num_rows": record.num_rows}
        write_column(store, manifest, record.shard, record.column, arrays, **sizes)


def test_every_form_of_a_store_is_within_what_it_states(coldstill: Run, write_recipe: Write, root: Path):
    for form in FORMS.values():
        hidden = {"blocks": [0, 3], **form}
        coldstill("precompute", write_recipe(targets={"logits": SAMPLED, "hidden": hidden}, loss__gamma=0.0))
    coldstill("precompute", write_recipe(targets={"logits": {"kind": "final"}, "hidden": hidden}, loss__gamma=0.0))
    answer = json.loads(coldstill("cache", "verify", root, "--live", 9, "--json").stdout)
    assert answer["is_clean"]
    live = answer["live"]
    assert (live["num_rows"], live["unchecked"], live["is_within"]) == (9, [], True)
    columns = {column["column"]: column for column in live["columns"]}
    assert columns.keys() == {
        "label_logit",
        "logsumexp/1",
        "logsumexp/2",
        TOPK,
        TAIL,
        FINAL,
        "logits/final/float16",
        *(f"hidden/{block}/{form}" for block in (0, 3) for form in ("int8", "coded_0.2_sampled_0.5", "float16")),
    }
    assert all(column["is_within"] and column["mean"] <= column["largest"] for column in columns.values())
    assert 0.001 < columns[TOPK]["largest"] < 0.011
    assert columns[TOPK]["noise_largest"] < 1e-3
    assert columns[TOPK]["stated"] == "at most 0.01 nats, and float32 rounding"
    assert 0 < columns[FINAL]["mean"] < 1e-2
    assert columns["logits/final/float16"]["mean"] < 1e-5
    assert columns[FINAL]["measure"] == "KL in nats"
    # Only eval rows have either, and a row's last token has none that follows.
    assert columns["label_logit"]["num_positions"] * 24 == columns["logits/final/float16"]["num_positions"] * 23
    for block in (0, 3):
        assert columns[f"hidden/{block}/float16"]["mean"] < columns[f"hidden/{block}/int8"]["mean"] < 1e-3
        assert 0 < columns[f"hidden/{block}/coded_0.2_sampled_0.5"]["num_positions"] < live["num_tokens"]


def test_more_rows_than_there_are_and_rows_of_many_lengths(coldstill: Run, write_recipe: Write, root: Path):
    recipe = write_recipe(data__packing=False, data__sequence_length=60, targets__hidden={"encoding": "bfloat16"})
    coldstill("precompute", recipe)
    printed = coldstill("cache", "verify", root, "--live", 1000).stdout
    assert "all as written" in printed
    for word in ("column", "measure", "mean", "largest", "noise", "stated", "hidden/2/bfloat16", "2**-8 of the value"):
        assert word in printed
    assert printed.splitlines()[-1].startswith("26 rows, ")
    assert printed.splitlines()[-1].endswith("run twice: every column is within what it states and ten times the noise")
    assert "beyond" not in printed


def test_a_column_that_none_of_the_rows_has_is_named(coldstill: Run, write_recipe: Write, root: Path):
    coldstill("precompute", write_recipe(targets={"logits": SAMPLED}))
    coldstill("precompute", write_recipe(data__train__max_rows=60, targets={"logits": {"kind": "final"}}))
    seen = [coldstill("cache", "verify", root, "--live", 1, "--json", expect=0).stdout for _ in range(2)]
    assert seen[0] == seen[1]
    assert set(json.loads(seen[0])["live"]["unchecked"]) & {TAIL, "logits/final/float16", FINAL}


@pytest.mark.parametrize(
    ("column", "array", "change"),
    [
        (TOPK, "maximum", lambda values: np.add(values, 0.02, out=values)),
        (TOPK, "ids_0", lambda values: np.bitwise_xor(values, 1, out=values)),
        (TAIL, "offsets_0", lambda values: np.bitwise_xor(values, 2, out=values)),
        ("label_logit", "values", lambda values: np.add(values, 0.01, out=values)),
        ("logsumexp/2", "values", lambda values: np.multiply(values, 1.001, out=values)),
        ("hidden/2/int8", "values", lambda values: np.bitwise_xor(values[:, 5], 1, out=values[:, 5])),
        (FINAL, "overflow", lambda values: np.add(values[7, :1], 1, out=values[7, :1])),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_slightly_wrong_numbers_with_good_checksums_are_found(
    coldstill: Run, write_recipe: Write, root: Path, column: str, array: str, change: Any
):
    logits = {"kind": "final"} if column == FINAL else SAMPLED
    coldstill("precompute", write_recipe(targets={"logits": logits, "hidden": {"encoding": "int8"}}))
    tamper(the_store(root), column, array, change)
    assert "all as written" in coldstill("cache", "verify", root).stdout
    found = json.loads(coldstill("cache", "verify", root, "--live", 100, "--json", expect=1).stdout)
    assert [error["column"] for error in found["live"]["columns"] if not error["is_within"]] == [column]
    assert not found["live"]["is_within"]
    if column == TOPK:
        printed = coldstill("cache", "verify", root, "--live", 3, expect=1).stdout
        last = printed.splitlines()[-1]
        assert last.startswith(f"{column} is beyond what it states and ten times the noise, most at row ")
        assert " of shard " in last
        assert ", position " in last


def test_another_teacher_is_refused(coldstill: Run, write_recipe: Write, root: Path, workplace: Path):
    coldstill("precompute", write_recipe())
    error = coldstill("cache", "verify", root, "--live", 2, "--teacher", workplace / "narrow", expect=2).stderr
    message = error.strip().splitlines()[-1]
    assert message.startswith(f"coldstill: store {the_store(root).path} was made with another teacher than ")
    assert message.endswith("with --teacher")


def test_a_teacher_that_is_gone_is_asked_for_and_one_that_moved_is_taken(
    coldstill: Run, write_recipe: Write, root: Path, workplace: Path
):
    coldstill("precompute", write_recipe())
    shutil.move(workplace / "teacher", workplace / "moved")
    error = coldstill("cache", "verify", root, "--live", 2, expect=2).stderr
    gone = f"the store's teacher {workplace / 'teacher'} is not at hand; name its folder with --teacher"
    assert error.strip().splitlines()[-1] == f"coldstill: {gone}"
    coldstill("cache", "verify", root, "--live", 2, "--teacher", workplace / "moved")
    missing = workplace / "nowhere"
    error = coldstill("cache", "verify", root, "--live", 2, "--teacher", missing, expect=2).stderr
    assert error.strip().splitlines()[-1] == f"coldstill: no model folder at {missing}"


def test_what_cannot_be_compared_says_so(coldstill: Run, write_recipe: Write, root: Path):
    coldstill("precompute", write_recipe())
    assert "belong to --live N" in coldstill("cache", "verify", root, "--store", "a", expect=2).stderr
    assert "no store zz in" in coldstill("cache", "verify", root, "--live", 1, "--store", "zz", expect=2).stderr
    store = the_store(root)
    for column in Manifest(store).columns():
        if column not in ("tokens", "output_head"):
            remove_column(store, column)
    assert "has no row to compare with its teacher" in coldstill("cache", "verify", root, "--live", 1, expect=2).stderr


def test_a_damaged_store_is_not_compared(coldstill: Run, write_recipe: Write, root: Path):
    coldstill("precompute", write_recipe())
    stored = next(path for path in sorted(root.rglob("label_logit/values/**/*")) if path.name != "zarr.json")
    stored.write_bytes(stored.read_bytes()[:-1])
    found = json.loads(coldstill("cache", "verify", root, "--live", 1, "--json", expect=1).stdout)
    assert (found["is_clean"], found["live"]) == (False, None)
