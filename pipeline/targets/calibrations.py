"""Calibrations of a store: the transform code of each coded column, committed once, before the column's first shard.

Both stages read them here; `coldstill.pipeline.stage_one.calibrate` makes them. A coded column names the digest of its
calibration, so that none is ever decoded with another.
"""

import hashlib
from collections.abc import Iterable

import torch
from coldstill.cache.arrays import read_column
from coldstill.cache.columns import ArraySpec, Column
from coldstill.cache.errors import IdentityError, IncompleteError
from coldstill.cache.manifest import Manifest
from coldstill.cache.store import CONSTANTS, Store
from coldstill.cache.writer import write_column
from coldstill.pipeline.targets.columns import calibration_name
from coldstill.pipeline.targets.encodings import CALIBRATION, to_numpy
from coldstill.pipeline.targets.transform_coding import TransformCode

_ARRAYS = {"centre": "centre_D", "analysis": "analysis_DD", "synthesis": "synthesis_DD", "spread": "spread_D"}


def write_calibration(
    store: Store, manifest: Manifest, name: str, code: TransformCode, *, num_positions: int, metric: str
) -> None:
    """Commit a transform code.

    Args:
        store: The store.
        manifest: Its manifest.
        name: As `coldstill.pipeline.targets.columns.calibration_name` gives it.
        code: What was fitted.
        num_positions: How many positions it was fitted to.
        metric: Which errors it weighs alike, for a person.
    """
    arrays = {array: to_numpy(getattr(code, field)) for array, field in _ARRAYS.items()}
    specs = {array: ArraySpec("float32", values.shape, axis="shard") for array, values in arrays.items()}
    attributes = {
        "decode": "coefficients = (state - centre) @ analysis; state = coefficients @ synthesis + centre",
        "metric": metric,
        "num_positions": num_positions,
    }
    write_column(store, manifest, CONSTANTS, Column(name, specs, attributes), arrays, num_tokens=0, num_rows=0)


def read_codes(store: Store, manifest: Manifest, columns: Iterable[str]) -> dict[str, TransformCode]:
    """Read the transform codes that some columns need, by the name of each column.

    Raises:
        IncompleteError: One was never committed.
        IdentityError: A committed shard of a column was coded with another.
    """
    codes: dict[str, TransformCode] = {}
    read: dict[str, TransformCode] = {}
    for column in columns:
        name = calibration_name(column)
        if name is None:
            continue
        if name not in read:
            if (CONSTANTS, name) not in manifest:
                raise IncompleteError(f"store {store.path} has no {name}; run: coldstill precompute")
            arrays = read_column(store, manifest.record(CONSTANTS, name))
            read[name] = TransformCode(**{_ARRAYS[array]: torch.from_numpy(values) for array, values in arrays.items()})
        codes[column] = read[name]
        _check_digest(store, manifest, column, code_digest(read[name]))
    return codes


def code_digest(code: TransformCode) -> str:
    """Give the SHA-256 of a transform code's numbers."""
    digest = hashlib.sha256()
    for field in _ARRAYS.values():
        digest.update(to_numpy(getattr(code, field)).tobytes())
    return digest.hexdigest()


def _check_digest(store: Store, manifest: Manifest, column: str, digest: str) -> None:
    for shard in manifest.shards(column):
        written = manifest.record(shard, column).column.attributes[CALIBRATION]
        if written != digest:
            raise IdentityError(
                f"store {store.path}: shard {shard} of column {column} was coded with another calibration: "
                f"{written[:12]} there, {digest[:12]} now; run: coldstill cache rm --column {column}, then "
                "coldstill precompute"
            )
