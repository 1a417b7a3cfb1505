"""How many bytes columns will take: by what they take in the store already, or at most."""

from collections.abc import Collection

import numpy as np
from coldstill.cache.manifest import Manifest
from coldstill.pipeline.models import text_config
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.targets.column_specs import describe_column
from coldstill.pipeline.targets.columns import state_form
from coldstill.pipeline.targets.encodings import CODED

# Arrays that are zero nearly everywhere, and hardly take a byte once they are compressed.
_SPARSE_ARRAYS = ("overflow", "gaps_1")


def measured_bytes(manifest: Manifest, column: str, *, shards: Collection[str] | None = None) -> float | None:
    """Give the bytes a token that a column takes where it is stored, in some shards or all; None where it is not."""
    chosen = [shard for shard in manifest.shards(column) if shards is None or shard in shards]
    records = [manifest.record(shard, column) for shard in chosen]
    num_tokens = sum(record.num_tokens for record in records)
    return sum(record.stored_bytes for record in records) / num_tokens if num_tokens else None


def raw_bytes(name: str, *, num_tokens: int, num_shards: int, teacher: Teacher) -> int:
    """Give the bytes of a column before compression, which it will hardly exceed."""
    config = text_config(teacher.config)
    form = state_form(name)
    fraction = form.fraction if form else 1.0
    if form and form.encoding == CODED:
        return round(int(config.hidden_size) * num_tokens * fraction)  # a byte holds one coefficient or more
    column = describe_column(name, width=int(config.hidden_size), vocab_size=int(config.vocab_size), codes={})
    total = 0.0
    for array, spec in column.arrays.items():
        if array not in _SPARSE_ARRAYS:
            count = num_shards if spec.axis == "shard" else num_tokens * fraction
            total += np.dtype(spec.dtype).itemsize * int(np.prod(spec.shape, dtype=np.int64)) * count
    return round(total)
