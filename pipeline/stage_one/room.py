"""Refuse a run of stage one that cannot fit on its disk: before it begins, and again when its first shard is there.

Before anything is written, columns that the store has elsewhere are known to the byte, and others count with the least
that compression makes of them. After the first shard every column is known.
"""

from collections.abc import Sequence

from coldstill.cache.errors import NoRoomError
from coldstill.cache.manifest import Manifest
from coldstill.cache.store import Store
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.stage_one.byte_estimates import measured_bytes, raw_bytes
from coldstill.pipeline.stage_one.shard_jobs import ShardJob

# What entropy coding leaves of a column at best: measured forms keep between 0.4 and 0.95 of their raw bytes.
_BEST_COMPRESSION = 0.25


def require_room(store: Store, manifest: Manifest, teacher: Teacher, jobs: Sequence[ShardJob]) -> None:
    """Hold the bytes that some jobs will write against the room that is left; object storage has room.

    Raises:
        NoRoomError: They cannot fit; says how much is needed and how much is free.
    """
    free = store.objects.free_bytes()
    if free is None:
        return
    needed = sum(least_bytes(manifest, teacher, jobs).values())
    if needed > free:
        raise NoRoomError(
            f"precompute needs {needed / 1e9:,.1f} GB more, {store.path} has {free / 1e9:,.1f} GB free; store fewer "
            "blocks or rows, or see: coldstill plan"
        )


def least_bytes(manifest: Manifest, teacher: Teacher, jobs: Sequence[ShardJob]) -> dict[str, float]:
    """Give the bytes that jobs will write at least, by column."""
    tokens: dict[str, int] = {}
    for job in jobs:
        for name in job.columns:
            tokens[name] = tokens.get(name, 0) + job.num_tokens
    needed = {}
    for name, num_tokens in tokens.items():
        per_token = measured_bytes(manifest, name)
        if per_token is None:
            raw = raw_bytes(name, num_tokens=num_tokens, num_shards=len(jobs), teacher=teacher)
            needed[name] = _BEST_COMPRESSION * raw
        else:
            needed[name] = per_token * num_tokens
    return needed
