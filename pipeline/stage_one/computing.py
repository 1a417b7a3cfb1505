"""One run of stage one over one store: rows registered, calibrations fitted, missing columns computed, all tidied."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tqdm import tqdm

from coldstill.cache.leases import LAYOUT, Lease, hold, living_writers
from coldstill.cache.manifest import Manifest
from coldstill.cache.objects import open_objects
from coldstill.cache.rows import compact_rows
from coldstill.cache.store import CONSTANTS, Store, create_store
from coldstill.pipeline.models.sizes import ModelSizes
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.outputs.run_index import RunRows, publish_run_rows
from coldstill.pipeline.stage_one.calibrate import calibrate, missing_calibrations
from coldstill.pipeline.stage_one.requests import (
    Demand,
    Request,
    RowRegistry,
    demand_of,
    missing_jobs,
    needed_targets,
    row_names,
)
from coldstill.pipeline.stage_one.room import require_room
from coldstill.pipeline.stage_one.shard_jobs import ShardJob
from coldstill.pipeline.stage_one.streamed_shards import shard_computer
from coldstill.pipeline.stage_one.workers import Share, first_process_first, launched_share
from coldstill.pipeline.stage_one.write_behind import WriteBehind
from coldstill.pipeline.targets.stored_head import OUTPUT_HEAD, write_head
from coldstill.pipeline.targets.target import TeacherTarget


@dataclass(frozen=True)
class Computed:
    """What was computed.

    Attributes:
        num_tokens: Tokens that the teacher ran over.
        written_bytes: Bytes written for them.
        seconds: Time of its pass over them, encoding and writing included; loading is not.
    """

    num_tokens: int = 0
    written_bytes: int = 0
    seconds: float = 0.0


class StoreWork:
    """The work of stage one on a teacher's store, which is created where it is not there.

    Args:
        root: Where stores are.
        teacher: The teacher.
    """

    def __init__(self, root: str, teacher: Teacher) -> None:
        self._root = root
        self._teacher = teacher
        self._sizes = ModelSizes.of(teacher.config)
        self._store = create_store(root, teacher.describe())
        self.manifest = Manifest(self._store)
        self._registry: RowRegistry | None = None

    @property
    def store(self) -> Store:
        """The store."""
        return self._store

    def register(self, requests: Sequence[Request]) -> list[Demand]:
        """Lay new rows into shards, commit their tokens, publish each recipe's selections, and say what each wants."""
        selections = []
        # One process at a time: two that lay the same rows differently would compute them twice.
        with hold(self._store.objects, [LAYOUT], wait=True) as lease:
            self._sweep(lease)
            self.manifest.reload()
            self._registry = RowRegistry(self._store, self.manifest)
            for request in requests:
                selections.append(self._registry.register(request, vocab_size=self._sizes.vocab_size))
                publish_run_rows(request.of.recipe, RunRows(self._store, selections[-1]))
        # Once all rows are laid: what serves one recipe may have been written for another.
        return [demand_of(request, rows, self.manifest) for request, rows in zip(requests, selections, strict=True)]

    def missing(self, demands: Sequence[Demand]) -> list[ShardJob]:
        """List what is missing, shard by shard."""
        assert self._registry is not None, "rows are registered first"
        return missing_jobs(self.manifest, self._registry.num_tokens, demands)

    def calibrate(self, demands: Sequence[Demand], *, show_progress: bool) -> None:
        """Fit the transform codes that targets need and the store lacks: one process does, the others wait for it."""
        wanted = dict.fromkeys(target for of_shard in needed_targets(demands).values() for target in of_shard)
        targets = [target for target in wanted if isinstance(target, TeacherTarget)]
        if not missing_calibrations(self.manifest, targets):
            return
        with hold(self._store.objects, [LAYOUT], wait=True):
            self.manifest.reload()
            if missing := missing_calibrations(self.manifest, targets):
                rows = demands[0].request.of.rows["train"]
                calibrate(self._store, self.manifest, self._teacher, missing, rows, show_progress=show_progress)

    def compute(self, demands: Sequence[Demand], share: Share, *, show_progress: bool) -> Computed:
        """Compute this process's share of what is missing, while no other process may."""
        # Of all shards, not of those that are missing now: another worker may be at work already.
        own_shards = set(share.of(list(needed_targets(demands))))
        jobs = [job for job in self.missing(demands) if job.shard in own_shards]
        # The head belongs to no shard, so one of the workers has to be the one that writes it.
        with self._held(jobs, needs_head=share.index == 0 and not self._has_head) as lease:
            if lease is None:
                return Computed()
            # What another process committed in the meantime is not computed again.
            jobs = [job for job in (job.without(self.manifest) for job in jobs) if job.targets]
            require_room(self._store, self.manifest, self._sizes, jobs)
            if share.index == 0 and not self._has_head:
                self._teacher.parts.rest()  # a large head takes its own memory once more while it is encoded
                write_head(self._store, self.manifest, self._teacher.parts.output_head)
            return self._run(jobs, demands, lease, show_progress=show_progress) if jobs else Computed()

    def tidy(self) -> None:
        """Fold the small files of a finished run and sweep, unless another process still writes."""
        objects = self._store.objects
        with first_process_first():
            if launched_share().index == 0 and not living_writers(objects):
                with hold(objects, [LAYOUT], wait=True):
                    self.manifest.compact()
                    compact_rows(self._store)
                objects.sweep(is_alone=True)
                open_objects(self._root).sweep(is_alone=False)
        self.manifest.reload()

    @property
    def _has_head(self) -> bool:
        return (CONSTANTS, OUTPUT_HEAD) in self.manifest

    @contextlib.contextmanager
    def _held(self, jobs: Sequence[ShardJob], *, needs_head: bool) -> Iterator[Lease | None]:
        """Hold the shards of some jobs, and what the store holds once; yields None where there is nothing to do."""
        held = [job.shard for job in jobs] + [CONSTANTS] * needs_head
        if not held:
            yield None
            return
        with hold(self._store.objects, held) as lease:
            self.manifest.reload()
            yield lease

    def _run(
        self, jobs: Sequence[ShardJob], demands: Sequence[Demand], lease: Lease, *, show_progress: bool
    ) -> Computed:
        """Run jobs one after another."""
        computer = shard_computer(
            self._store, self.manifest, self._teacher, row_names=lambda row_ids: row_names(demands, row_ids)
        )
        computed = Computed(num_tokens=sum(job.num_tokens for job in jobs))
        started = time.monotonic()
        with tqdm(
            total=computed.num_tokens, unit="tok", unit_scale=True, desc="precompute", disable=not show_progress
        ) as bar:

            def on_written(num_bytes: int) -> None:
                nonlocal computed
                computed = replace(computed, written_bytes=computed.written_bytes + num_bytes)
                bar.set_postfix_str(f"{computed.written_bytes / 1e6:.1f} MB written", refresh=False)

            with WriteBehind(self._store, self.manifest, on_written) as writer:

                def on_tokens(num_tokens: float) -> None:
                    # A lease may be lost while a laptop sleeps; two writers of a shard would be found only at its end.
                    lease.require()
                    bar.update(num_tokens)

                done = 0
                while done < len(jobs):
                    lease.require()
                    together = jobs[done : done + computer.num_at_once]
                    computer.run(together, writer, on_tokens)
                    if done == 0:
                        # What each column takes is known now, before the hours are spent.
                        writer.flush()
                        require_room(self._store, self.manifest, self._sizes, jobs[len(together) :])
                    done += len(together)
        return replace(computed, seconds=time.monotonic() - started)

    def _sweep(self, lease: Lease) -> None:
        """Remove what killed writers left half-written."""
        objects = self._store.objects
        objects.sweep(is_alone=all(writer.file == lease.file for writer in living_writers(objects)))
