"""A recipe whose teacher speaks as training goes, `targets.source: live`: its rows, student and teacher, and no store.

What stands for the store has the teacher's facts and the name that its store would have; nothing is written there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from coldstill.cache.laying import lines_behind_one_another
from coldstill.cache.objects import open_objects
from coldstill.cache.selections import make_selection
from coldstill.cache.store import Store, store_path
from coldstill.cache.tokens import TOKENS
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.outputs.run_index import RunRows
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.stage_one.requests import SPLITS, RecipeRows, gather
from coldstill.pipeline.stage_two.batches import BatchCollator, BatchColumns, TokenRows
from coldstill.pipeline.stage_two.live_targets import LiveTargets
from coldstill.pipeline.students.preparing import prepare_student

# What a live run's rows lie in, where those of a store lie in shards.
_SHARD = "live"


@dataclass(frozen=True)
class LiveRun:
    """A recipe's rows and teacher in memory.

    Attributes:
        run: The rows by split, named by what they are, and the teacher's facts.
        teacher: The teacher, which is loaded when it is first asked for.
        student: The folder of the recipe's student.
        gathered: The rows themselves.
    """

    run: RunRows
    teacher: Teacher
    student: Path
    gathered: RecipeRows

    def rows(self, split: str) -> TokenRows:
        """Return the rows of a split as a torch dataset."""
        return TokenRows(self.gathered.rows[split].rows)

    @property
    def teacher_model(self) -> PreTrainedModel:
        """The teacher itself, which is loaded now."""
        return self.teacher.parts.model

    @property
    def collator(self) -> BatchCollator:
        """What lays rows side by side; targets come later."""
        return BatchCollator(BatchColumns(logits={}, hidden={}), {TOKENS: {"ids": "token"}})

    def judged(self) -> "JudgedLive":
        """Return the source of what evaluation asks of the teacher."""
        return JudgedLive(self)


class JudgedLive:
    """What a live teacher says of the eval rows.

    Args:
        live: The run.
    """

    def __init__(self, live: LiveRun) -> None:
        self._live = live
        self._targets = LiveTargets(live.teacher_model, blocks=(), with_logits=True, with_numbers=True)
        self.forms = self._targets.forms
        self.collator = live.collator

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Run the teacher over a batch, and return its targets."""
        with torch.inference_mode():
            return self._targets(batch)

    def rows(self, split: str) -> TokenRows:
        """Return the rows of a split."""
        return self._live.rows(split)


def gather_live(recipe: Recipe, *, trains_here: bool = False) -> LiveRun:
    """Find a recipe's teacher, make its rows and, where it is not there yet, its student.

    Args:
        recipe: The recipe.
        trains_here: Whether its student is trained now, on this machine.

    Raises:
        ColdstillError: Something in the recipe cannot be carried out.
    """
    teacher, (gathered,) = gather([recipe], trains_here=trains_here)
    student = prepare_student(recipe, teacher, gathered.rows["train"])
    store = Store(open_objects(store_path(recipe.cache, teacher.fingerprint)), teacher.describe())
    selections = {}
    for split in SPLITS:
        rows = gathered.rows[split]
        found = lines_behind_one_another(_SHARD, rows)
        selections[split] = make_selection(found, rows.spans(), gathered.provenance(split), rows.labels())
    return LiveRun(RunRows(store, selections), teacher, student.folder, gathered)
