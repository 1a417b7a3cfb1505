"""A store read with zarr, pyarrow and hashlib alone, by what docs/format.md says: none of Coldstill's reading code."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr

from cache.manifest import Manifest
from cache.reader import Reader
from cache.store import open_store
from pipeline.encodings import decode_hidden
from pipeline.recipe_file import load_recipe
from pipeline.run_index import find_run_rows


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def short_digest(data: bytes) -> str:
    return sha256(data)[:16]


@pytest.fixture
def folder(coldstill: Callable[..., Any], write_recipe: Callable[..., Path], workplace: Path, monkeypatch) -> Path:
    monkeypatch.setattr("cache.rows.SHARD_TOKENS", 240)
    coldstill("precompute", write_recipe())
    (folder,) = (workplace / "caches/stores").iterdir()
    return folder


def test_the_root_group_names_format_and_teacher(folder: Path):
    said = json.loads((folder / "arrays.zarr/zarr.json").read_text())["attributes"]["coldstill"]
    assert said["format"] == 2
    assert said.pop("check") == sha256(canonical(said))
    assert folder.name == short_digest(canonical(said["teacher"]["identity"]))


def test_every_record_names_its_objects_and_is_repeated_in_the_group(folder: Path):
    (file,) = (folder / "commits").iterdir()
    assert file.stem == short_digest(file.read_bytes())
    records = pq.read_table(file).to_pylist()
    assert len(records) > 20
    for record in records:
        place = "constants" if record["shard"] == "constants" else f"shards/{record['shard']}"
        column = folder / "arrays.zarr" / place / record["column"]
        repeated = json.loads((column / "zarr.json").read_text())["attributes"]["coldstill"]
        assert repeated.pop("check") == sha256(canonical(repeated))
        assert repeated == record
        for array, entry in json.loads(record["objects"]).items():
            (stored,) = (column / array).glob("c.*")
            assert stored.stat().st_size == entry["bytes"]
            assert sha256(stored.read_bytes()) == entry["sha256"]


def test_rows_and_shards_are_named_by_their_tokens(folder: Path):
    (file,) = (folder / "rows").iterdir()
    assert file.stem == short_digest(file.read_bytes())
    places = {(line["shard"], line["position"]): line for line in pq.read_table(file).to_pylist()}
    shards = zarr.open_group(str(folder / "arrays.zarr/shards"), mode="r")
    num_rows = 0
    for name, shard in shards.groups():
        ids, lengths = shard["tokens/ids"][:], shard["tokens/lengths"][:]
        assert shard["tokens/ids"].metadata.dimension_names == ("token",)
        assert shard["tokens/lengths"].metadata.dimension_names == ("row",)
        row_ids = []
        for position, row in enumerate(np.split(ids, np.cumsum(lengths)[:-1])):
            row_ids.append(hashlib.sha256(b"coldstill row 1\0" + row.astype("<u4").tobytes()).digest()[:16])
            place = places[name, position]
            assert place["row"] == row_ids[-1]
            np.testing.assert_array_equal(ids[place["start"] : place["start"] + place["length"]], row)
        assert name == short_digest(b"coldstill shard 1\0" + b"".join(row_ids))
        num_rows += len(row_ids)
    assert num_rows == len(places) == 26


def test_a_selection_is_named_by_its_content(folder: Path):
    for file in (folder / "selections").iterdir():
        table = pq.read_table(file)
        hasher = hashlib.sha256(b"coldstill selection 2\0" + table.schema.metadata[b"provenance"] + b"\0")
        shards = table["shard"].to_pylist()
        names = list(dict.fromkeys(shards))
        hasher.update("\n".join(names).encode() + b"\0")
        hasher.update(np.array([names.index(shard) for shard in shards], "<i4").tobytes())
        hasher.update(b"".join(table["row"].to_pylist()))
        for name in ("position", "start", "length", "loss_start"):
            hasher.update(b"\0" + name.encode() + b"\0" + np.array(table[name].to_pylist(), "<i4").tobytes())
        assert file.stem == hasher.hexdigest()[:16]


def test_zarr_reads_what_the_reader_reads(folder: Path, workplace: Path):
    run = find_run_rows(load_recipe(workplace / "recipe.yaml", []))
    shards = zarr.open_group(str(folder / "arrays.zarr/shards"), mode="r")
    selection = run.selections["eval"]
    names = Manifest(open_store(str(folder))).columns()
    reader = Reader(run.store, selection, [name for name in names if name != "output_head"])
    for index in range(len(reader)):
        shard = shards[selection.shard_names[selection.shard_numbers[index]]]
        tokens = slice(selection.starts[index], selection.starts[index] + selection.lengths[index])
        for column, arrays in reader.row(index).items():
            for array, values in arrays.items():
                stored = shard[f"{column}/{array}"]
                cut = tokens if stored.metadata.dimension_names[0] == "token" else slice(None)
                np.testing.assert_array_equal(stored[cut], values)


def test_the_example_of_the_page_decodes_hidden_states(folder: Path, capsys: pytest.CaptureFixture[str]):
    page = (Path(__file__).parents[2] / "docs/format.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    example = re.sub(r'"caches/stores/\w+/', f'"{folder}/', example).replace("hidden/12", "hidden/1")
    read: dict[str, Any] = {}
    exec(example, read)
    shards = zarr.open_group(str(folder / "arrays.zarr/shards"), mode="r")
    assert capsys.readouterr().out.count("centre + spread * scale * values") == len(list(shards.groups())) > 1
    assert read["hidden"].shape == (len(read["ids"]), 32)
    values = decode_hidden({name: torch.from_numpy(read["states"][name][:]) for name in read["states"]})
    np.testing.assert_allclose(read["hidden"], values.numpy(), rtol=1e-5, atol=1e-5)
