"""Calibrations of a store: the transform code of each coded column, committed once, before the column's first shard.

Both stages read them here; `coldstill.pipeline.stage_one.calibrate` makes them. A coded column names the digest of its
calibration, so that none is ever decoded with another.
"""

import hashlib

import torch

from coldstill.cache.arrays import read_column
from coldstill.cache.columns import ArraySpec, Column
from coldstill.cache.errors import IdentityError, IncompleteError
from coldstill.cache.manifest import Manifest
from coldstill.cache.store import CONSTANTS, Store
from coldstill.cache.writer import write_column
from coldstill.pipeline.targets.encodings import to_numpy
from coldstill.pipeline.targets.transform_coding import TransformCode

# The attribute of a coded column that says which calibration it was coded with.
CALIBRATION = "calibration"

_ARRAYS = {"centre": "centre_D", "analysis": "analysis_DD", "synthesis": "synthesis_DD", "spread": "spread_D"}


def write_calibration(
    store: Store, manifest: Manifest, name: str, code: TransformCode, *, num_positions: int, metric: str
) -> None:
    """Commit a transform code.

    Args:
        store: The store.
        manifest: Its manifest.
        name: What a target's `calibration` says.
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


def read_code(store: Store, manifest: Manifest, calibration: str, *, column: str) -> TransformCode:
    """Read the transform code that a column's calibration keeps.

    Raises:
        IncompleteError: It was never committed.
        IdentityError: A committed shard of the column was coded with another.
    """
    if (CONSTANTS, calibration) not in manifest:
        raise IncompleteError(f"store {store.path} has no {calibration}; run: coldstill precompute")
    arrays = read_column(store, manifest.record(CONSTANTS, calibration))
    code = TransformCode(**{_ARRAYS[array]: torch.from_numpy(values) for array, values in arrays.items()})
    _check_digest(store, manifest, column, code_digest(code))
    return code


def code_digest(code: TransformCode) -> str:
    """Return the SHA-256 of a transform code's numbers."""
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
