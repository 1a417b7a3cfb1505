"""What a recipe will cost and what it buys, measured on a small sample before anything is spent."""

from collections.abc import Mapping
from dataclasses import dataclass

from coldstill.cache.manifest import Manifest
from coldstill.cache.objects import open_objects
from coldstill.cache.store import CONSTANTS, ROOT_METADATA, open_store, store_path
from coldstill.cache.tokens import TOKENS
from coldstill.pipeline.estimates.budget import LogitsOption, Proposal, proposals
from coldstill.pipeline.estimates.target_options import KindPlan, measure_hidden, measure_kinds
from coldstill.pipeline.estimates.teacher_memory import TeacherMemory
from coldstill.pipeline.estimates.trial import Trial, trial_of
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.stage_one.dry_run import ColumnCost, dry_run
from coldstill.pipeline.targets.kinds import parse_target, teacher_targets
from coldstill.pipeline.targets.states import BlockOutput


@dataclass(frozen=True)
class ColumnPlan:
    """A column of the recipe.

    Attributes:
        name: Its name.
        bytes_per_token: On disk.
        missing_bytes: What the shards that lack it will take.
    """

    name: str
    bytes_per_token: float
    missing_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a recipe will cost and what it buys.

    Attributes:
        store: The store that would be written.
        num_tokens: Tokens of all rows.
        missing_tokens: Tokens that the teacher has yet to read.
        columns: What is written.
        constant_bytes: What the store lacks of what it holds once: output head and calibrations.
        missing_bytes: What is written in all.
        free_bytes: Room where the store is; None where that does not say.
        teacher: What the teacher takes in memory.
        tokens_per_s: Of stage one.
        hours: Of stage one, loading aside.
        train_memory_bytes: The most memory that training holds.
        temperature: Of the loss, where fidelity is measured.
        kinds: Logits targets, the most faithful first.
        proposals: What fits the budget, the best first; empty without a budget.
        budget_bytes: The budget.
    """

    store: str
    num_tokens: int
    missing_tokens: int
    columns: list[ColumnPlan]
    constant_bytes: int
    missing_bytes: int
    free_bytes: int | None
    teacher: TeacherMemory
    tokens_per_s: float
    hours: float
    train_memory_bytes: int
    temperature: float
    kinds: list[KindPlan]
    proposals: list[Proposal]
    budget_bytes: int | None


def plan(recipe: Recipe, *, budget_bytes: int | None = None, num_rows: int = 16, show_progress: bool = True) -> Plan:
    """Measure a recipe on a few of its rows, in a temporary folder; the recipe's own cache and output stay as they are.

    Args:
        recipe: The recipe.
        budget_bytes: What the columns of all rows may take; proposals are made for it.
        num_rows: How many train rows to measure on; at least what two steps of training read.
        show_progress: Whether to show progress bars.

    Raises:
        ColdstillError: Something in the recipe cannot be carried out.
    """
    needed = dry_run(recipe, trains_here=True)  # a trial of a few steps
    teacher = TeacherMemory.of(Teacher.locate(recipe.teacher))
    with trial_of(recipe, num_rows=num_rows, show_progress=show_progress) as trial:
        per_token = trial.bytes_per_token()
        columns = [_column_plan(cost, per_token) for cost in needed.columns]
        constant_bytes = _missing_constants(recipe, trial)
        tokens_per_s = trial.summary.computed_tokens / trial.summary.seconds
        memory = trial.train_memory_bytes()
        kinds = measure_kinds(recipe, trial, show_progress=show_progress)
        proposed: list[Proposal] = []
        if budget_bytes is not None:
            hidden = measure_hidden(recipe, trial, show_progress=show_progress)
            logits = [LogitsOption(kind.setting, kind.bytes_per_token, kind.fidelity.grad_cosine) for kind in kinds]
            proposed = proposals(budget_bytes - constant_bytes, needed.num_tokens, per_token[TOKENS], logits, hidden)
    return Plan(
        store=needed.store,
        num_tokens=needed.num_tokens,
        missing_tokens=needed.computed_tokens,
        columns=columns,
        constant_bytes=constant_bytes,
        missing_bytes=sum(column.missing_bytes for column in columns) + constant_bytes,
        free_bytes=open_objects(recipe.cache).free_bytes(),
        teacher=teacher,
        tokens_per_s=tokens_per_s,
        hours=needed.computed_tokens / tokens_per_s / 3600,
        train_memory_bytes=memory,
        temperature=recipe.loss.temperature,
        kinds=sorted(kinds, key=lambda kind: -kind.fidelity.grad_cosine),
        proposals=proposed,
        budget_bytes=budget_bytes,
    )


def _column_plan(cost: ColumnCost, per_token: Mapping[str, float]) -> ColumnPlan:
    measured = per_token.get(cost.name)
    if measured is None and (cost.is_undecided or isinstance(parse_target(cost.name), BlockOutput)):
        # Which blocks these are is known when the student was pruned, and of fewer rows the trial may map others: its
        # own blocks stand for them.
        blocks = [target.name for target in teacher_targets(per_token) if isinstance(target, BlockOutput)]
        measured = sum(per_token[name] for name in blocks) / len(blocks) if blocks else None
    if measured is None:
        # A column of the store that serves the recipe, such as more logits than it asks for: the store knows its size.
        measured = cost.missing_bytes / max(cost.missing_tokens, 1)
    return ColumnPlan(cost.name, measured, round(measured * cost.missing_tokens))


def _missing_constants(recipe: Recipe, trial: Trial) -> int:
    path = store_path(recipe.cache, trial.run.store.name)
    there: set[str] = set()
    if open_objects(path).exists(ROOT_METADATA):
        manifest = Manifest(open_store(path))
        there = {name for name in manifest.columns() if (CONSTANTS, name) in manifest}
    return sum(size for name, size in trial.constant_bytes().items() if name not in there)
