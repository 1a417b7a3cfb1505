"""Stage one: make the columns that recipes ask for complete for their rows. Where all are, no model is loaded."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from coldstill.cache.manifest import Manifest
from coldstill.cache.selections import Selection
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.outputs.provenance import PROVENANCE_FILE, write_record
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.runtime.interruptions import what_stays
from coldstill.pipeline.stage_one.computing import StoreWork
from coldstill.pipeline.stage_one.requests import (
    SPLITS,
    Demand,
    RecipeRows,
    Request,
    blocks_to_store,
    find_rows,
    locate_teacher,
    needed_targets,
    require_stored,
)
from coldstill.pipeline.stage_one.workers import (
    Share,
    first_process_first,
    launched_share,
    sum_over_processes,
    wait_for_everyone,
)
from coldstill.pipeline.students.preparing import prepare_student


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
        share: Which shards to compute, where several workers compute them; the processes of torchrun or accelerate
            launch divide it among them.
        show_progress: Whether to show a progress bar.

    Raises:
        ColdstillError: Something in a recipe cannot be carried out; what was committed stays.
        OSError: The disk refuses; what was committed stays.
    """
    progress = _Progress()
    with what_stays(progress.words):
        return _precompute(recipes, share, progress, show_progress=show_progress)


class _Progress:
    """How many of the recipes' shards are complete, for whoever interrupts the run."""

    def __init__(self) -> None:
        self._manifest: Manifest | None = None
        self._columns: Mapping[str, Collection[str]] = {}

    def watch(self, manifest: Manifest, demands: Sequence[Demand]) -> None:
        """Say from now on what of these demands the manifest has."""
        self._manifest = manifest
        self._columns = {
            shard: [target.name for target in targets] for shard, targets in needed_targets(demands).items()
        }

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
    share = (share or Share()).part(launched_share())
    require_stored(recipes)
    teacher = locate_teacher(recipes)
    with first_process_first():
        gathered = find_rows(recipes, teacher, show_progress=show_progress)
        requests = [_request(item, teacher) for item in gathered]
        work = StoreWork(recipes[0].cache, teacher)
        demands = work.register(requests)
    progress.watch(work.manifest, demands)
    work.calibrate(demands, show_progress=show_progress)
    computed = work.compute(demands, share, show_progress=show_progress)
    wait_for_everyone()
    computed_tokens, written_bytes = sum_over_processes([computed.num_tokens, computed.written_bytes])
    work.tidy()
    selections = _selections(demands)
    summary = PrecomputeSummary(
        store=work.store.path,
        students=[str(request.student.folder) for request in requests if request.student is not None],
        num_rows=_count_rows(demands),
        num_shared=sum(selection.provenance["num_shared"] for selection in selections),
        num_tokens=sum(selection.num_tokens for selection in selections),
        num_shards=len({shard for selection in selections for shard in selection.shard_names}),
        computed_tokens=computed_tokens,
        written_bytes=written_bytes,
        missing_shards=len(work.missing(demands)),
        teacher_was_loaded=teacher.is_loaded,
        seconds=computed.seconds,
    )
    for demand in demands:
        _write_record(demand, work.store.name, teacher, summary)
    return summary


def _request(item: RecipeRows, teacher: Teacher) -> Request:
    """Say what a recipe asks for, whose student is found or made for it."""
    student = prepare_student(item.recipe, teacher, item.rows["train"])
    return Request(item, blocks_to_store(item.recipe, teacher, student.folder), student)


def _write_record(demand: Demand, store: str, teacher: Teacher, summary: PrecomputeSummary) -> None:
    recipe, student = demand.request.of.recipe, demand.request.student
    folder = Path(recipe.output) / "precompute"
    was_made = student is not None and student.was_made
    # Also where a run that was killed computed everything, but did not come to write it down.
    if summary.computed_tokens or was_made or not (folder / PROVENANCE_FILE).exists():
        facts = {
            "teacher": teacher.identity,
            "store": store,
            "selections": {split: selection.name for split, selection in demand.selections.items()},
            "precompute": asdict(summary),
        }
        write_record(folder, recipe, facts)


def _selections(demands: Sequence[Demand]) -> list[Selection]:
    """Return each selection once: recipes over the same data have the same ones."""
    return list({selection.name: selection for demand in demands for selection in demand.selections.values()}.values())


def _count_rows(demands: Sequence[Demand]) -> dict[str, int]:
    splits: Mapping[str, dict[str, int]] = {split: {} for split in SPLITS}
    for demand in demands:
        for split, selection in demand.selections.items():
            splits[split][selection.name] = len(selection)
    return {split: sum(counts.values()) for split, counts in splits.items()}
