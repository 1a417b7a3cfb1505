"""Refuse a run of stage one that cannot fit on its disk: before it begins, and again when its first shard is there.

Before anything is written, columns that the store has elsewhere are known to the byte, and others count with the least
that compression makes of them. After the first shard every column is known.
"""

from collections.abc import Sequence

from coldstill.cache.errors import NoRoomError
from coldstill.cache.manifest import Manifest
from coldstill.cache.store import Store
from coldstill.pipeline.models.sizes import ModelSizes
from coldstill.pipeline.stage_one.shard_jobs import ShardJob
from coldstill.pipeline.targets.target import TeacherTarget

# What entropy coding leaves of a column at best: measured forms keep between 0.4 and 0.95 of their raw bytes.
_BEST_COMPRESSION = 0.25


def require_room(store: Store, manifest: Manifest, sizes: ModelSizes, jobs: Sequence[ShardJob]) -> None:
    """Hold the bytes that some jobs will write against the room that is left; object storage has room.

    Raises:
        NoRoomError: They cannot fit; says how much is needed and how much is free.
    """
    free = store.objects.free_bytes()
    if free is None:
        return
    needed = sum(least_bytes(manifest, sizes, jobs).values())
    if needed > free:
        raise NoRoomError(
            f"precompute needs {needed / 1e9:,.1f} GB more, {store.path} has {free / 1e9:,.1f} GB free; store fewer "
            "blocks or rows, or see: coldstill plan"
        )


def least_bytes(manifest: Manifest, sizes: ModelSizes, jobs: Sequence[ShardJob]) -> dict[str, float]:
    """Return the bytes that jobs will write at least, by column."""
    tokens: dict[TeacherTarget, int] = {}
    for job in jobs:
        for target in job.targets:
            tokens[target] = tokens.get(target, 0) + job.num_tokens
    needed = {}
    for target, num_tokens in tokens.items():
        per_token = manifest.bytes_per_token(target.name)
        if per_token is None:
            raw = target.raw_bytes(sizes, num_tokens=num_tokens, num_shards=len(jobs))
            needed[target.name] = _BEST_COMPRESSION * raw
        else:
            needed[target.name] = per_token * num_tokens
    return needed
