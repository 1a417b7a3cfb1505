"""Compute what many shards lack with a teacher that streams in: all their batches pass one block, then the next.

Such shards are a super-batch. The teacher's files are read once for it, so the more tokens it has, the more work there
is behind which the reading hides. Which shards are computed together changes no byte: batches are each shard's own, and
each runs as it would by itself.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from coldstill.cache.manifest import Manifest
from coldstill.cache.store import Store
from coldstill.pipeline.models import ModelParts
from coldstill.pipeline.models.forward import InputOf, Place
from coldstill.pipeline.models.structure import BlockLoader
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.stage_one.shard_jobs import (
    Batch,
    OnTokens,
    RowNames,
    ShardComputer,
    ShardJob,
    ShardRows,
    Waiting,
)
from coldstill.pipeline.stage_one.streamed_capture import StreamedBatch, SuperBatch
from coldstill.pipeline.stage_one.write_behind import WriteBehind
from coldstill.pipeline.targets.captured import Captured, CaptureRequest, union_of
from coldstill.pipeline.targets.target import TeacherTarget

# Of its time, what a super-batch may wait for weights before the next one is made of more shards.
BEARABLE_WAIT = 0.03


def shard_computer(store: Store, manifest: Manifest, teacher: Teacher, *, row_names: RowNames) -> ShardComputer:
    """Return what runs shard jobs with a teacher, which is loaded now: one by one, or together where it streams in."""
    parts, batch_size = teacher.parts, teacher.section.batch_size
    if parts.loader is None:
        return ShardComputer(store, manifest, parts, batch_size=batch_size, row_names=row_names)
    return StreamedShards(store, manifest, parts, parts.loader, batch_size=batch_size, row_names=row_names)


class StreamedShards(ShardComputer):
    """Runs shard jobs together, with a teacher that streams in.

    Begins with one shard, and takes twice as many while blocks wait for their weights and memory allows it.

    Args:
        store: Where to write.
        manifest: Its manifest.
        parts: The teacher.
        loader: What brings its blocks their weights.
        batch_size: Rows of a teacher batch.
        row_names: Gives what errors call some rows, by their ids; others are named by their place in the shard.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        parts: ModelParts,
        loader: BlockLoader,
        *,
        batch_size: int,
        row_names: RowNames,
    ) -> None:
        super().__init__(store, manifest, parts, batch_size=batch_size, row_names=row_names)
        self._loader = loader
        self._num_at_once = 1

    @property
    def num_at_once(self) -> int:
        """How many jobs `run` is to be given next."""
        return self._num_at_once

    def run(self, jobs: Sequence[ShardJob], writer: WriteBehind, on_tokens: OnTokens) -> None:
        """Compute the targets of jobs and hand them over to be committed; reports tokens as they are done.

        What is made of a stream alone is handed over as soon as its shard has passed the block.
        """
        started, waited_s = time.perf_counter(), self._loader.waited_s
        together = SuperBatch(self._parts, sum(job.num_tokens for job in jobs))
        under_way = [self._begin(job, together) for job in jobs]
        for index in range(len(self._parts.blocks)):
            for shard in under_way:
                if shard.left:
                    self._pass(shard, index, writer, on_tokens)
        self._loader.drop()  # the last block's memory, for what is made of last states
        for shard in under_way:
            if shard.left:
                self._end(shard, writer)
        waited_share = (self._loader.waited_s - waited_s) / (time.perf_counter() - started)
        tokens_each = max(job.num_tokens for job in jobs)
        if waited_share > BEARABLE_WAIT and 2 * len(jobs) * tokens_each <= together.affordable_tokens():
            self._num_at_once = 2 * len(jobs)

    def _begin(self, job: ShardJob, together: SuperBatch) -> "_ShardUnderWay":
        rows = self._read(job.shard)
        batches = [_Batch(batch, together.batch(batch.rows, batch.names)) for batch in self._batches(job.shard, rows)]
        return _ShardUnderWay(job, rows, batches, list(job.targets))

    def _pass(self, shard: "_ShardUnderWay", index: int, writer: WriteBehind, on_tokens: OnTokens) -> None:
        """Let a shard pass a block, and write what is complete behind it."""
        num_blocks = len(self._parts.blocks)
        for batch in shard.batches:
            shard.keep(batch.streamed.step(index, shard.places), batch.streamed.num_tokens)
            on_tokens(batch.streamed.num_tokens / num_blocks)
        if ready := shard.take_ready(index):
            self._write(shard.job, shard.rows, ready, shard.captured(ready), writer)
            if not shard.left:  # it enters no other block
                shard.batches.clear()
                on_tokens(shard.job.num_tokens * (num_blocks - 1 - index) / num_blocks)

    def _end(self, shard: "_ShardUnderWay", writer: WriteBehind) -> None:
        """Compute what is made of last states and logits."""
        request = union_of(target.needs for target in shard.left)
        waiting = Waiting(shard.job, self._parts.device)
        for batch in shard.batches:
            uniforms_N = batch.of_rows.uniforms.draw("tail") if request.tails else None
            waiting.add(batch.streamed.end(request, uniforms_N=uniforms_N), batch.streamed.num_tokens)
        ended = replace(waiting.joined(), hidden_ND=shard.captured(shard.left).hidden_ND)
        self._write(shard.job, shard.rows, shard.left, ended, writer)


@dataclass(frozen=True)
class _Batch:
    """A batch of a shard, and the same batch under way."""

    of_rows: Batch
    streamed: StreamedBatch


@dataclass
class _ShardUnderWay:
    """A shard whose batches pass the blocks.

    Attributes:
        job: What is to be computed for it.
        rows: Its rows.
        batches: Its batches.
        left: The targets that are not handed over yet.
    """

    job: ShardJob
    rows: ShardRows
    batches: list[_Batch]
    left: list[TeacherTarget]
    _waiting: dict[Place, Waiting] = field(default_factory=dict)
    _hidden_ND: dict[Place, Tensor] = field(default_factory=dict)

    @property
    def places(self) -> tuple[Place, ...]:
        """Where the stream is still to be kept, or is kept."""
        return union_of(target.needs for target in self.left).blocks

    def keep(self, streams_ND: Mapping[Place, Tensor], num_tokens: int) -> None:
        """Keep the stream of the next batch, of so many tokens, at some places."""
        for place, values_ND in streams_ND.items():
            waiting = self._waiting.setdefault(place, Waiting(self.job, values_ND.device))
            waiting.add(Captured(hidden_ND={place: values_ND}), num_tokens)

    def take_ready(self, index: int) -> list[TeacherTarget]:
        """Return the targets that are made of the stream alone, as far as behind a block; they are no longer left."""
        ready = [target for target in self.left if _is_ready(target.needs, index)]
        self.left = [target for target in self.left if target not in ready]
        return ready

    def captured(self, targets: Sequence[TeacherTarget]) -> Captured:
        """Return the streams that targets are made of; those that no target that is left needs go."""
        wanted = union_of(target.needs for target in targets).blocks
        for place in wanted:
            if place not in self._hidden_ND:
                self._hidden_ND |= self._waiting.pop(place).joined().hidden_ND
        captured = Captured(hidden_ND={place: self._hidden_ND[place] for place in wanted})
        still_wanted = self.places
        self._hidden_ND = {place: kept for place, kept in self._hidden_ND.items() if place in still_wanted}
        return captured


def _is_ready(needs: CaptureRequest, index: int) -> bool:
    if needs.final_state or needs.needs_logits:
        return False
    return all((place.block if isinstance(place, InputOf) else place) <= index for place in needs.blocks)
