"""Stage one: make the columns that recipes ask for complete for their rows. Where all are, no model is loaded."""

import functools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from coldstill.cache.leases import LAYOUT, Lease, hold, living_writers
from coldstill.cache.manifest import Manifest
from coldstill.cache.objects import open_objects
from coldstill.cache.rows import compact_rows
from coldstill.cache.selections import Selection
from coldstill.cache.store import CONSTANTS, Store, create_store
from coldstill.pipeline.models import text_config
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.outputs.provenance import PROVENANCE_FILE, write_record
from coldstill.pipeline.outputs.run_index import RunRows, publish_run_rows
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.rows.building import tokenizer_digest
from coldstill.pipeline.runtime.interruptions import what_stays
from coldstill.pipeline.stage_one.calibrate import calibrate, missing_calibrations
from coldstill.pipeline.stage_one.requests import (
    SPLITS,
    Demand,
    Request,
    RowRegistry,
    blocks_to_store,
    build_requested_rows,
    demand_of,
    locate_teacher,
    missing_jobs,
    needed_columns,
    row_names,
)
from coldstill.pipeline.stage_one.room import require_room
from coldstill.pipeline.stage_one.shard_jobs import ShardComputer, ShardJob
from coldstill.pipeline.stage_one.workers import (
    Share,
    first_process_first,
    launched_share,
    sum_over_processes,
    wait_for_everyone,
)
from coldstill.pipeline.stage_one.write_behind import WriteBehind
from coldstill.pipeline.students.preparing import PreparedStudent, prepare_student
from coldstill.pipeline.targets.calibrations import read_codes
from coldstill.pipeline.targets.columns import OUTPUT_HEAD
from coldstill.pipeline.targets.stored_head import write_head
from tqdm import tqdm


@dataclass(frozen=True)
class PrecomputeSummary:
    """What a run of stage one did.

    Attributes:
        store: The store's folder or URL.
        students: The folder of each recipe's student.
        num_rows: Rows of each split, of all recipes.
        num_shared: Documents and rows that train does without because eval has them.
        num_tokens: Tokens of all rows.
        num_shards: Shards that hold them.
        computed_tokens: Tokens that the teacher ran over; 0 where everything was complete.
        written_bytes: Bytes written for them.
        missing_shards: Shards that other workers have yet to complete.
        teacher_was_loaded: Whether the teacher's weights were needed.
        seconds: Time of the teacher's pass over the rows, encoding and writing included; loading is not.
    """

    store: str
    students: list[str]
    num_rows: dict[str, int]
    num_shared: int
    num_tokens: int
    num_shards: int
    computed_tokens: int
    written_bytes: int
    missing_shards: int
    teacher_was_loaded: bool
    seconds: float


def precompute(*recipes: Recipe, share: Share | None = None, show_progress: bool = True) -> PrecomputeSummary:
    """Make the recipes' columns complete for their rows, and their students if they are to be pruned.

    All recipes name the same teacher and cache: it is loaded once for all of them, if it is needed at all, and reads
    each shard once for all that the shard lacks.

    Args:
        recipes: One or more.
        share: Which shards to compute, where several processes compute them; under torchrun or accelerate launch it
            follows from the rank.
        show_progress: Whether to show a progress bar.

    Raises:
        ColdstillError: Something in a recipe cannot be carried out; what was committed stays.
        OSError: The disk refuses; what was committed stays.
    """
    progress = _Progress()
    with what_stays(progress.words):
        return _precompute(recipes, share, progress, show_progress=show_progress)


class _Progress:
    """How many of the recipes' shards are complete, for who interrupts the run."""

    def __init__(self) -> None:
        self._manifest: Manifest | None = None
        self._columns: Mapping[str, Collection[str]] = {}

    def watch(self, manifest: Manifest, demands: Sequence[Demand]) -> None:
        """Say from now on what of these demands the manifest has."""
        self._manifest, self._columns = manifest, needed_columns(demands)

    def words(self) -> str:
        """Say what is complete, and whether to run the command again is to go on."""
        manifest, columns = self._manifest, self._columns
        if manifest is None:
            return "before it came to the shards; run the same command again"
        complete = sum(all((shard, name) in manifest for name in names) for shard, names in columns.items())
        if not complete:
            return f"before the first of {len(columns)} shards was complete; the same command begins with it"
        return f"with {complete} of {len(columns)} shards complete; run the same command again to go on"


def _precompute(
    recipes: Sequence[Recipe], share: Share | None, progress: _Progress, *, show_progress: bool
) -> PrecomputeSummary:
    share = share or launched_share()
    teacher = locate_teacher(recipes)
    built = build_requested_rows(recipes, teacher)
    with first_process_first():
        students = [
            prepare_student(recipe, teacher, rows["train"]) for recipe, rows in zip(recipes, built, strict=True)
        ]
        tokenizer = tokenizer_digest(teacher.tokenizer)
        requests = [
            Request(recipe, rows, tokenizer, blocks_to_store(recipe, teacher, student.folder))
            for recipe, rows, student in zip(recipes, built, students, strict=True)
        ]
        store = create_store(recipes[0].cache, teacher.describe())
        manifest = Manifest(store)
        registry, runs = _register(store, manifest, requests, teacher)
    demands = [demand_of(request, run.selections, manifest) for request, run in zip(requests, runs, strict=True)]
    progress.watch(manifest, demands)
    _calibrate(store, manifest, teacher, demands, requests)
    # Of all shards, not of those that are missing now: another worker may be at work already.
    own_shards = set(share.of(list(needed_columns(demands))))
    jobs = [job for job in missing_jobs(manifest, registry.known, demands) if job.shard in own_shards]
    tokens, written, seconds = _compute_held(
        teacher, store, manifest, demands, jobs, requests, share, show_progress=show_progress
    )
    wait_for_everyone()
    computed_tokens, written_bytes = sum_over_processes([tokens, written])
    _tidy(recipes[0].cache, store, manifest)
    summary = PrecomputeSummary(
        store=store.path,
        students=[str(student.folder) for student in students],
        num_rows=_count_rows(runs),
        num_shared=sum(selection.provenance["num_shared"] for selection in _selections(runs)),
        num_tokens=sum(selection.num_tokens for selection in _selections(runs)),
        num_shards=len({shard for selection in _selections(runs) for shard in selection.shard_names}),
        computed_tokens=computed_tokens,
        written_bytes=written_bytes,
        missing_shards=len(missing_jobs(manifest, registry.known, demands)),
        teacher_was_loaded=teacher.is_loaded,
        seconds=seconds,
    )
    _write_records(recipes, runs, students, teacher, summary)
    return summary


def _register(
    store: Store, manifest: Manifest, requests: Sequence[Request], teacher: Teacher
) -> tuple[RowRegistry, list[RunRows]]:
    """Lay new rows into shards, commit their tokens, and publish each recipe's selections."""
    vocab_size = int(text_config(teacher.config).vocab_size)
    runs = []
    # One process at a time: two that lay the same rows differently would compute them twice.
    with hold(store.objects, [LAYOUT], wait=True) as lease:
        _sweep(store, lease)
        manifest.reload()
        registry = RowRegistry(store, manifest)
        for request in requests:
            runs.append(RunRows(store, registry.register(request, vocab_size=vocab_size)))
            publish_run_rows(request.recipe, runs[-1])
    return registry, runs


def _sweep(store: Store, lease: Lease) -> None:
    """Remove what killed writers left half-written."""
    is_alone = all(writer.file == lease.file for writer in living_writers(store.objects))
    store.objects.sweep(is_alone=is_alone)


def _calibrate(
    store: Store, manifest: Manifest, teacher: Teacher, demands: Sequence[Demand], requests: Sequence[Request]
) -> None:
    """Fit the transform codes that columns need and the store lacks: one process does, the others wait for it."""
    columns = [name for names in needed_columns(demands).values() for name in names]
    if not missing_calibrations(manifest, columns):
        return
    with hold(store.objects, [LAYOUT], wait=True):
        manifest.reload()
        if missing := missing_calibrations(manifest, columns):
            calibrate(store, manifest, teacher, missing, requests[0].rows["train"].tokens)


def _compute_held(
    teacher: Teacher,
    store: Store,
    manifest: Manifest,
    demands: Sequence[Demand],
    jobs: list[ShardJob],
    requests: Sequence[Request],
    share: Share,
    *,
    show_progress: bool,
) -> tuple[int, int, float]:
    """Run the jobs while no other process may: tokens that were read, bytes that were written, and seconds."""
    needs_head = share.index == 0 and (CONSTANTS, OUTPUT_HEAD) not in manifest
    if not jobs and not needs_head:
        return 0, 0, 0.0
    with hold(store.objects, [job.shard for job in jobs] + [CONSTANTS] * needs_head) as lease:
        # What another process committed in the meantime is not computed again.
        manifest.reload()
        jobs = [job for job in (job.without(manifest) for job in jobs) if job.columns]
        check_room = functools.partial(require_room, store, manifest, teacher)
        check_room(jobs)
        if needs_head and (CONSTANTS, OUTPUT_HEAD) not in manifest:
            write_head(store, manifest, teacher.parts.output_head)
        if not jobs:
            return 0, 0, 0.0
        computer = ShardComputer(
            store,
            manifest,
            teacher.parts,
            [target for demand in demands for target in demand.targets.values()],
            codes=read_codes(store, manifest, dict.fromkeys(name for job in jobs for name in job.columns)),
            batch_size=requests[0].recipe.teacher.batch_size,
            row_names=row_names(requests),
        )
        started = time.monotonic()
        written_bytes = _run(computer, store, manifest, jobs, check_room, lease, show_progress=show_progress)
        return sum(job.num_tokens for job in jobs), written_bytes, time.monotonic() - started


def _run(
    computer: ShardComputer,
    store: Store,
    manifest: Manifest,
    jobs: Sequence[ShardJob],
    check_room: Callable[[Sequence[ShardJob]], None],
    lease: Lease,
    *,
    show_progress: bool,
) -> int:
    """Run the jobs one after another, and give the bytes that they wrote."""
    written_bytes = 0
    total = sum(job.num_tokens for job in jobs)
    with tqdm(total=total, unit="tok", unit_scale=True, desc="precompute", disable=not show_progress) as bar:

        def on_written(num_bytes: int) -> None:
            nonlocal written_bytes
            written_bytes += num_bytes
            bar.set_postfix_str(f"{written_bytes / 1e6:.1f} MB written", refresh=False)

        with WriteBehind(store, manifest, on_written) as writer:
            for number, job in enumerate(jobs):
                lease.require()
                computer.run(job, writer, bar.update)
                if number == 0:
                    # What each column takes is known now, before the hours are spent.
                    writer.flush()
                    check_room(jobs[1:])
    return written_bytes


def _tidy(root: str, store: Store, manifest: Manifest) -> None:
    """Fold the small files of a finished run and sweep, unless another process still writes."""
    with first_process_first():
        if launched_share().index == 0 and not living_writers(store.objects):
            with hold(store.objects, [LAYOUT], wait=True):
                manifest.compact()
                compact_rows(store)
            store.objects.sweep(is_alone=True)
            open_objects(root).sweep(is_alone=False)
    manifest.reload()


def _write_records(
    recipes: Sequence[Recipe],
    runs: Sequence[RunRows],
    students: Sequence[PreparedStudent],
    teacher: Teacher,
    summary: PrecomputeSummary,
) -> None:
    for recipe, run, student in zip(recipes, runs, students, strict=True):
        folder = Path(recipe.output) / "precompute"
        # Also where a run that was killed computed everything, but did not come to write it down.
        if summary.computed_tokens or student.was_made or not (folder / PROVENANCE_FILE).exists():
            names = {split: selection.name for split, selection in run.selections.items()}
            facts = {
                "teacher": teacher.identity,
                "store": run.store.name,
                "selections": names,
                "precompute": asdict(summary),
            }
            write_record(folder, recipe, facts)


def _selections(runs: Sequence[RunRows]) -> list[Selection]:
    """Give each selection once: recipes over the same data have the same ones."""
    return list({selection.name: selection for run in runs for selection in run.selections.values()}.values())


def _count_rows(runs: Sequence[RunRows]) -> dict[str, int]:
    splits: Mapping[str, dict[str, int]] = {split: {} for split in SPLITS}
    for run in runs:
        for split, selection in run.selections.items():
            splits[split][selection.name] = len(selection)
    return {split: sum(counts.values()) for split, counts in splits.items()}
