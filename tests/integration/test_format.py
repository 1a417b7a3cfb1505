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

from coldstill.cache.manifest import Manifest
from coldstill.cache.reader import Reader
from coldstill.cache.store import open_store
from coldstill.pipeline.outputs.run_index import find_run_rows
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.targets.encodings import StateForm, decode_state
from coldstill.pipeline.targets.stored_constants import read_codes
from coldstill.pipeline.targets.token_encodings import decode_tail, decode_topk


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def short_digest(data: bytes) -> str:
    return sha256(data)[:16]


def tensors(group: zarr.Group) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array[:]) for name, array in group.arrays()}


def planes(group: zarr.Group, name: str) -> np.ndarray:
    """Join byte planes, by the page."""
    parts = sorted(key for key in group if key.startswith(f"{name}_"))
    return sum(group[part][:].astype(np.int64) << (8 * place) for place, part in enumerate(parts))


@pytest.fixture
def folder(coldstill: Callable[..., Any], write_recipe: Callable[..., Path], workplace: Path, monkeypatch) -> Path:
    monkeypatch.setattr("coldstill.cache.laying.SHARD_TOKENS", 240)
    coldstill("precompute", write_recipe())
    (folder,) = (workplace / "caches/stores").iterdir()
    return folder


def test_the_root_group_names_format_and_teacher(folder: Path):
    said = json.loads((folder / "arrays.zarr/zarr.json").read_text())["attributes"]["coldstill"]
    assert said["format"] == 3
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
    decode = "centre + spread * scale * (values + 255 * overflow)"
    assert capsys.readouterr().out.count(decode) == len(list(shards.groups())) > 1
    assert read["hidden"].shape == (len(read["ids"]), 32)
    values = decode_state(tensors(read["states"]), form=StateForm("int8"))
    np.testing.assert_allclose(read["hidden"], values.numpy(), rtol=1e-5, atol=1e-5)


KINDS = {
    "sampled": {"logits": {"kind": "topk_sampled", "k": 16, "samples": 8, "temperatures": [2, 1]}},
    "coded": {"logits": {"kind": "final"}, "hidden": {"encoding": "coded", "step": 0.4, "token_fraction": 0.5}},
}


@pytest.fixture
def shard(coldstill: Callable[..., Any], write_recipe: Callable[..., Path], workplace: Path) -> zarr.Group:
    """A shard of eval rows with every kind of column."""
    for targets in KINDS.values():
        coldstill("precompute", write_recipe(targets=targets))
    (store,) = (workplace / "caches/stores").iterdir()
    shards = zarr.open_group(str(store / "arrays.zarr/shards"), mode="r")
    return next(shard for _, shard in shards.groups() if "logits/final/float16" in shard)


def test_the_largest_logits_are_gaps_below_a_maximum(shard: zarr.Group):
    group = shard["logits/topk/16/delta"]
    assert sorted(group) == ["gaps_0", "gaps_1", "ids_0", "ids_1", "maximum"]
    logits = group["maximum"][:][:, None] - 0.02 * planes(group, "gaps").cumsum(axis=1)
    expected, ids = decode_topk(tensors(group), k=16)
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(planes(group, "ids"), ids.numpy())


def test_draws_with_their_weights_count_the_tail(shard: zarr.Group):
    group, top = shard["logits/tail/16_8/1_2"], shard["logits/topk/16/delta"]
    assert sorted(group) == ["ids_0", "ids_1", "log_weights", "maximum", "offsets_0", "offsets_1"]
    ids, logits = planes(group, "ids"), group["maximum"][:][:, None] - 0.02 * planes(group, "offsets")
    expected, expected_ids, _ = decode_tail(tensors(group))
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(ids, expected_ids.numpy())
    assert (np.diff(ids, axis=1) >= 0).all()
    assert not any(np.isin(drawn, head).any() for drawn, head in zip(ids, planes(top, "ids"), strict=True))
    normaliser = shard["logsumexp/1/values"][:][:, None]
    head = np.exp(top["maximum"][:][:, None] - 0.02 * planes(top, "gaps").cumsum(axis=1) - normaliser).sum(axis=1)
    tail = (np.exp(logits - normaliser) * np.exp(group["log_weights"][:].astype(float))).sum(axis=1)
    assert abs((head + tail).mean() - 1) < 0.02


@pytest.mark.parametrize("name", ["logits/final/coded_0.03", "hidden/1/coded_0.4_sampled_0.5"])
def test_coded_states_follow_from_layout_overflow_and_calibration(shard: zarr.Group, workplace: Path, name: str):
    (folder,) = (workplace / "caches/stores").iterdir()
    group = shard[name]
    calibration = zarr.open_group(str(folder / "arrays.zarr/constants/calibration" / name.rsplit("/", 1)[0]), mode="r")
    arrays = [calibration[array][:] for array in ("centre", "analysis", "synthesis", "spread")]
    assert group.attrs["calibration"] == sha256(b"".join(values.astype("<f4").tobytes() for values in arrays))
    centre, analysis, synthesis, spread = arrays
    np.testing.assert_allclose(analysis @ synthesis, np.eye(32), atol=1e-3)
    step = group.attrs["step"]
    classes = [(8, 255, 1), (4, 255, 1), (1.5, 255, 1), (0.5, 15, 2), (0.3, 5, 3), (0, 3, 5)]
    layout, first = [], 0
    for number, (above, base, per_byte) in enumerate(classes):
        last = int((spread.astype(float) / step > above).sum()) if above else len(spread)
        if last > first:
            layout.append([f"digits_{number}", first, last, base, per_byte])
        first = last
    assert group.attrs["layout"] == layout
    levels = []
    for array, first, last, base, per_byte in layout:
        packed = group[array][:].astype(int)
        assert packed.shape[1] == -(-(last - first) // per_byte)
        digits = np.stack([packed // base**place % base for place in range(per_byte)], axis=-1) - base // 2
        levels.append(digits.reshape(len(packed), -1)[:, : last - first] + base * group["overflow"][:, first:last])
    states = step * np.concatenate(levels, axis=1) @ synthesis.astype(float) + centre
    store = open_store(str(folder))
    code = read_codes(store, Manifest(store), [name])[name]
    expected = decode_state(tensors(group), form=StateForm.parse(name.rsplit("/", 1)[-1]), code=code)
    np.testing.assert_allclose(states, expected.numpy(), rtol=1e-3, atol=1e-3)
    if "stored" in group:
        stored = group["stored"][:].astype(bool)
        assert 0 < stored.mean() < 1
        assert not any(group[array][:][~stored].any() for array in group)
    else:
        exact = shard["logits/final/float16/values"][:].astype(float)
        coefficients = (states - exact) @ analysis
        assert np.abs(coefficients).max() < 0.51 * step + 0.01
