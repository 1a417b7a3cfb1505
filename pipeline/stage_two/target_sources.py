"""Where the targets of a batch come from. A store gives them here; a teacher beside the student in `live_targets`.

Training, evaluation, similarity and a plan's fidelity all read what the teacher says through a source.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, Protocol, Self

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import PreTrainedModel

from coldstill.cache.columns import Axis
from coldstill.cache.manifest import Manifest
from coldstill.cache.reader import require_complete
from coldstill.pipeline.losses.logits_targets import LogitsTarget
from coldstill.pipeline.models.counted import counted_of
from coldstill.pipeline.outputs.run_index import RunRows
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.stage_two.batches import BatchCollator, BatchColumns, RowSet, StoredRows
from coldstill.pipeline.stage_two.completing import TARGET_KEYS
from coldstill.pipeline.stage_two.distiller import TargetForms
from coldstill.pipeline.targets.encodings import StateForm
from coldstill.pipeline.targets.forms import FINAL, LABEL, NORMALISER, HiddenForm, LogitsForm
from coldstill.pipeline.targets.kinds import stored_targets
from coldstill.pipeline.targets.logits_kinds import Roles, logits_targets
from coldstill.pipeline.targets.states import BlockOutput
from coldstill.pipeline.targets.stored_constants import StoredConstants
from coldstill.pipeline.targets.wanted import EVAL_LABEL, EVAL_NORMALISER, EVAL_STATE, block_output, eval_form

_HOST = torch.device("cpu")


class TargetSource(Protocol):
    """Gives the targets of batches."""

    @property
    def forms(self) -> TargetForms:
        """How the targets that it gives are read."""
        ...

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the targets of a batch, by the distiller's names, on its device.

        Args:
            batch: `input_ids` [B, T], and `attention_mask` and `position_ids` where it has them.
        """


class RowSource(TargetSource, Protocol):
    """A source that has the rows, too."""

    @property
    def collator(self) -> BatchCollator:
        """What lays the rows of a batch side by side."""
        ...

    def rows(self, split: str) -> RowSet:
        """Return the rows of a split as a torch dataset."""


class LiveRows(Protocol):
    """The rows of a recipe whose teacher speaks as training goes."""

    @property
    def collator(self) -> BatchCollator:
        """What lays the rows of a batch side by side."""
        ...

    @property
    def teacher_model(self) -> PreTrainedModel:
        """The teacher."""
        ...

    def rows(self, split: str) -> RowSet:
        """Return the rows of a split as a torch dataset."""
        ...


class StoredTargets:
    """Targets from a store: they come with the rows, which `rows` reads and `collator` lays side by side.

    Args:
        run: The rows.
        form: Says how the distribution is read; None where it is not.
        roles: The targets that it is read from.
        hidden: The targets of block outputs, all in one form.
        local_copy: A folder that keeps copies of what is read; None to read the store in place.
    """

    def __init__(
        self,
        run: RunRows,
        *,
        form: Callable[[StoredConstants], LogitsForm] | None = None,
        roles: Roles | None = None,
        hidden: Mapping[int, BlockOutput] | None = None,
        local_copy: str | None = None,
    ) -> None:
        self.run = run
        self._logits_form = form
        self._roles = roles or {}
        self._hidden = dict(hidden or {})
        self._local_copy = local_copy
        self._manifest = Manifest(run.store)
        self.columns = BatchColumns(
            logits={role: target.name for role, target in self._roles.items()},
            hidden={block: target.name for block, target in self._hidden.items()},
        )

    @classmethod
    def of_recipe(cls, recipe: Recipe, run: RunRows, *, blocks: Sequence[int], temperature: float | None) -> Self:
        """Return what a recipe learns from.

        Args:
            recipe: The recipe.
            run: Its rows.
            blocks: The teacher blocks that are mapped.
            temperature: Where the distribution is read; None where it is not.
        """
        hidden = {block: block_output(recipe.targets.hidden, block) for block in sorted(set(blocks))}
        if temperature is None:
            return cls(run, hidden=hidden, local_copy=recipe.local_copy)
        kind = logits_targets(recipe.targets.logits)
        roles = kind.read_at(temperature, Manifest(run.store), run.selections["train"].shard_names)
        form = partial(kind.form, roles)
        return cls(run, form=form, roles=roles, hidden=hidden, local_copy=recipe.local_copy)

    @classmethod
    def of_judging(cls, run: RunRows, local_copy: str | None) -> Self:
        """Return the distribution that eval rows are judged by."""
        return cls(run, form=eval_form, roles={FINAL: EVAL_STATE}, local_copy=local_copy)

    @classmethod
    def of_numbers(cls, run: RunRows, local_copy: str | None) -> Self:
        """Return the numbers that the teacher's own loss on eval rows is made of."""
        return cls(run, roles={LABEL: EVAL_LABEL, NORMALISER: EVAL_NORMALISER}, local_copy=local_copy)

    @classmethod
    def of_all_blocks(cls, recipe: Recipe, run: RunRows, *, split: str) -> Self:
        """Return the outputs of all teacher blocks that a split has in the recipe's form."""
        manifest, form = Manifest(run.store), block_output(recipe.targets.hidden, 0).form
        shards = set(run.selections[split].shard_names)
        found = [
            target
            for target in stored_targets(manifest)
            if isinstance(target, BlockOutput) and target.form == form and shards.issubset(manifest.shards(target.name))
        ]
        hidden = {target.block: target for target in sorted(found, key=lambda target: target.block)}
        return cls(run, hidden=hidden, local_copy=recipe.local_copy)

    def require_complete(self, *splits: str) -> None:
        """Refuse a store that lacks a column of some splits, all of them where none is named.

        Raises:
            IncompleteError: It does.
        """
        for split in splits or self.run.selections:
            selection = self.run.selections[split]
            require_complete(self._manifest, selection, self.columns.names(), store=self.run.store.path)

    @cached_property
    def forms(self) -> TargetForms:
        """How the targets are read, with what the store holds for them once.

        Raises:
            StoreError: A calibration or the output head is missing, or another one.
        """
        constants = StoredConstants(self.run.store, self._manifest)
        logits = None if self._logits_form is None else self._logits_form(constants)
        hidden = None
        if self._hidden:
            codes = {block: constants.code(target) for block, target in self._hidden.items()}
            present = {block: code for block, code in codes.items() if code is not None}
            hidden = HiddenForm(self._form, present)
        return TargetForms(logits, hidden)

    @cached_property
    def collator(self) -> BatchCollator:
        """What lays the rows of a batch side by side, with their targets."""
        shard = next(iter(self.run.selections.values())).shard_names[0]
        return BatchCollator(self.columns, self._axes(shard))

    def rows(self, split: str) -> StoredRows:
        """Return the rows of a split as a torch dataset, with their targets."""
        selection = self.run.selections[split]
        return StoredRows(self.run.store.path, selection, self.columns, local_copy=self._local_copy)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the targets that a batch of the store's rows has brought along."""
        return {name: batch[name] for name in TARGET_KEYS if name in batch}

    def first_rows(self, split: str, num_rows: int, *, device: torch.device = _HOST) -> dict[str, Any]:
        """Read the first rows of a split as one batch, with its targets.

        Raises:
            IncompleteError: The columns are not there for all rows of the split.
        """
        self.require_complete(split)
        rows = self.rows(split)
        batch = self.collator(rows.__getitems__(range(min(num_rows, len(rows)))))
        return {key: send_to_device(values, device) for key, values in batch.items()}

    def distribution(self, batch: Mapping[str, Any], temperature: float) -> LogitsTarget:
        """Return the teacher's distribution at a batch's positions that count."""
        assert self.forms.logits is not None, "the source reads no distribution"
        with torch.no_grad():
            return self.forms.logits.read(batch["logits"], counted_of(batch), temperature)

    def states(self, batch: Mapping[str, Any], counts_BT: Tensor) -> tuple[dict[int, Tensor], Tensor]:
        """Return each block's states [N, D] at some positions, and which of these are stored, [B, T].

        Args:
            batch: A batch.
            counts_BT: The positions.
        """
        form = self.forms.hidden
        assert form is not None, "the source reads no block outputs"
        # Which positions are stored is the same for every block.
        chosen_BT = form.chosen(batch["hidden"], next(iter(self._hidden)), counts_BT)
        return {block: form.decode(batch["hidden"], block)[chosen_BT] for block in self._hidden}, chosen_BT

    @property
    def _form(self) -> StateForm:
        (form,) = {target.form for target in self._hidden.values()}
        return form

    def _axes(self, shard: str) -> dict[str, dict[str, Axis]]:
        """Read the axis of each array off one committed shard; it is the same in all."""
        records = {name: self._manifest.record(shard, name) for name in self.columns.names()}
        return {
            name: {array: spec.axis for array, spec in record.column.arrays.items()} for name, record in records.items()
        }
