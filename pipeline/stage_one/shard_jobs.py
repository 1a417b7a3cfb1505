"""Compute what one shard lacks: teacher batches, encodings on the teacher's device, columns handed to their writer.

Batches never straddle a shard and depend on nothing but the shard and the batch size, so a shard that is computed again
has the same bytes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import overload

import numpy as np
import torch
from torch import Tensor

from coldstill.cache.arrays import read_column
from coldstill.cache.identity import row_ids
from coldstill.cache.manifest import Manifest
from coldstill.cache.row_lines import id_array
from coldstill.cache.store import Store
from coldstill.cache.tokens import LENGTHS, TOKENS
from coldstill.pipeline.models import ModelParts
from coldstill.pipeline.models.sizes import ModelSizes
from coldstill.pipeline.runtime.errors import RecipeError
from coldstill.pipeline.stage_one.capture import capture
from coldstill.pipeline.stage_one.write_behind import WriteBehind
from coldstill.pipeline.targets.captured import Captured, joined, union_of
from coldstill.pipeline.targets.encodings import to_numpy
from coldstill.pipeline.targets.row_uniforms import RowUniforms
from coldstill.pipeline.targets.stored_constants import StoredConstants
from coldstill.pipeline.targets.target import Encoding, TeacherTarget
from coldstill.pipeline.targets.transform_coding import TransformCode

OnTokens = Callable[[float], None]
RowNames = Callable[[Sequence[bytes]], Mapping[bytes, str]]

# What was captured of a shard waits on an accelerator up to so many bytes.
_WAITING_BYTES = 1 << 30
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class ShardJob:
    """Targets to compute for one shard.

    Attributes:
        shard: Its name.
        num_tokens: Tokens of its rows.
        targets: Those whose columns are missing.
    """

    shard: str
    num_tokens: int
    targets: tuple[TeacherTarget, ...]

    def without(self, manifest: Manifest) -> "ShardJob":
        """Return the job without the columns that are complete by now."""
        missing = (target for target in self.targets if (self.shard, target.name) not in manifest)
        return replace(self, targets=tuple(missing))


class ShardComputer:
    """Runs shard jobs with one teacher.

    Args:
        store: Where to write.
        manifest: Its manifest.
        parts: The teacher.
        batch_size: Rows of a teacher batch.
        row_names: Gives what errors call some rows, by their ids; others are named by their place in the shard.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        parts: ModelParts,
        *,
        batch_size: int,
        row_names: RowNames,
    ) -> None:
        self._store = store
        self._manifest = manifest
        self._parts = parts
        self._batch_size = batch_size
        self._row_names = row_names
        self._constants = StoredConstants(store, manifest)
        self._codes: dict[str, TransformCode] = {}

    @property
    def num_at_once(self) -> int:
        """How many jobs `run` is to be given next."""
        return 1

    def run(self, jobs: Sequence[ShardJob], writer: WriteBehind, on_tokens: OnTokens) -> None:
        """Compute the targets of jobs and hand them over to be committed; reports tokens as they are done."""
        for job in jobs:
            rows = self._read(job.shard)
            request = union_of(target.needs for target in job.targets)
            captured = Waiting(job, self._parts.device)
            for batch in self._batches(job.shard, rows):
                # The draws of a row are its own, so that it has them in whichever batch it runs.
                uniforms_N = batch.uniforms.draw("tail") if request.tails else None
                kept = capture(self._parts, batch.rows, request, row_names=batch.names, uniforms_N=uniforms_N)
                captured.add(kept, batch.num_tokens)
                on_tokens(batch.num_tokens)
            self._write(job, rows, job.targets, captured.joined(), writer)

    def _write(
        self,
        job: ShardJob,
        rows: "ShardRows",
        targets: Sequence[TeacherTarget],
        captured: Captured,
        writer: WriteBehind,
    ) -> None:
        """Encode targets of all rows of a job, and hand them over to be committed."""
        # One shard waits for the disk at most: memory is bounded, and a full disk is met before the next shard's work.
        writer.flush()
        for target in targets:
            code = self._code(target)
            column = target.describe(ModelSizes(self._parts.hidden_size, self._parts.vocab_size), code)
            by = Encoding(
                column=column,
                code=code,
                uniforms=RowUniforms(rows.ids, rows.lengths),
                device=self._parts.device,
            )
            try:
                host = {array: to_numpy(values) for array, values in target.encode(captured, by).items()}
            except OverflowError as error:
                raise RecipeError(
                    f"column {target.name} cannot be stored: {error}; use another encoding, such as bfloat16 or int8"
                ) from None
            writer.write(job.shard, column, host, num_tokens=job.num_tokens, num_rows=len(rows.ids))

    def _code(self, target: TeacherTarget) -> TransformCode | None:
        """Return a target's transform code on the teacher's device, which it is brought to once."""
        code = self._constants.code(target)
        return None if code is None else self._codes.setdefault(target.name, code.to(self._parts.device))

    def _read(self, shard: str) -> "ShardRows":
        values = read_column(self._store, self._manifest.record(shard, TOKENS))
        lengths = values[LENGTHS].tolist()
        tokens = torch.from_numpy(values["ids"].astype(np.int64)).split(lengths)
        return ShardRows(id_array(row_ids(values["ids"], lengths)).to_pylist(), lengths, tokens)

    def _batches(self, shard: str, rows: "ShardRows") -> Iterator["Batch"]:
        # Never across shards: a shard that is computed again runs in the same batches, and rounds alike.
        for start in range(0, len(rows.ids), self._batch_size):
            chosen = slice(start, start + self._batch_size)
            ids = rows.ids[chosen]
            names = _Names(self._row_names, ids, [f"row {start + place} of shard {shard}" for place in range(len(ids))])
            yield Batch(list(rows.tokens[chosen]), RowUniforms(ids, rows.lengths[chosen]), names)


@dataclass(frozen=True)
class ShardRows:
    """The rows of a shard: their ids, lengths and token ids."""

    ids: list[bytes]
    lengths: list[int]
    tokens: Sequence[Tensor]


@dataclass(frozen=True)
class _Names(Sequence[str]):
    """What errors call the rows of a batch, which is found out where there is one."""

    row_names: RowNames
    ids: Sequence[bytes]
    others: Sequence[str]

    @cached_property
    def _found(self) -> list[str]:
        names = self.row_names(self.ids)
        return [names.get(row, other) for row, other in zip(self.ids, self.others, strict=True)]

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._found[index]


@dataclass(frozen=True)
class Batch:
    """Rows of a teacher batch.

    Attributes:
        rows: Their token ids.
        uniforms: Their numbers of chance.
        names: How errors name them.
    """

    rows: list[Tensor]
    uniforms: RowUniforms
    names: Sequence[str]

    @property
    def num_tokens(self) -> int:
        """Tokens of its rows."""
        return sum(self.uniforms.lengths)


class Waiting:
    """What was captured of a shard's batches so far.

    Args:
        job: Of the shard.
        place: Where it waits for the other batches, unless that is too much for an accelerator.
    """

    def __init__(self, job: ShardJob, place: torch.device) -> None:
        self._job = job
        self._place = place
        self._kept: list[Captured] = []

    def add(self, kept: Captured, num_tokens: int) -> None:
        """Take what was captured of the next batch, of so many tokens."""
        # By what the first batch holds: no kind of target has to say how much it is.
        if not self._kept and kept.num_bytes / num_tokens * self._job.num_tokens > _WAITING_BYTES:
            self._place = _HOST
        self._kept.append(kept.to(self._place))

    def joined(self) -> Captured:
        """Return what was captured of the shard, which waits no longer."""
        # Statistics such as the spread of a channel are the shard's: nothing is encoded before all of it is there.
        captured = joined(self._kept)
        self._kept.clear()
        return captured
