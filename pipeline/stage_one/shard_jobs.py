"""Compute what one shard lacks: teacher batches, encodings on the teacher's device, columns handed to their writer.

Batches never straddle a shard and depend on nothing but the shard and the batch size, so a shard that is computed again
has the same bytes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from coldstill.cache.arrays import read_column
from coldstill.cache.manifest import Manifest
from coldstill.cache.store import Store
from coldstill.cache.tokens import TOKENS
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

# What was captured of a shard waits on an accelerator up to so many bytes.
_WAITING_BYTES = 1 << 30
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class ShardJob:
    """Targets to compute for one shard.

    Attributes:
        shard: Its name.
        rows: Its rows as `coldstill.cache.rows.shard_rows` gives them.
        targets: Those whose columns are missing.
    """

    shard: str
    rows: pa.Table
    targets: tuple[TeacherTarget, ...]

    def without(self, manifest: Manifest) -> "ShardJob":
        """Return the job without the columns that are complete by now."""
        missing = (target for target in self.targets if (self.shard, target.name) not in manifest)
        return replace(self, targets=tuple(missing))

    @property
    def row_ids(self) -> list[bytes]:
        """The id of each row."""
        return self.rows["row"].to_pylist()

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return self.rows["length"].to_pylist()

    @property
    def num_tokens(self) -> int:
        """Tokens of the shard."""
        return sum(self.lengths)


class ShardComputer:
    """Runs shard jobs with one teacher.

    Args:
        store: Where to write.
        manifest: Its manifest.
        parts: The teacher.
        batch_size: Rows of a teacher batch.
        row_names: How errors name a row, by its id; others are named by their place in the shard.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        parts: ModelParts,
        *,
        batch_size: int,
        row_names: Mapping[bytes, str],
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
            request = union_of(target.needs for target in job.targets)
            captured = Waiting(job, self._parts.device)
            for batch in self._batches(job):
                # The draws of a row are its own, so that it has them in whichever batch it runs.
                uniforms_N = batch.uniforms.draw("tail") if request.tails else None
                kept = capture(self._parts, batch.rows, request, row_names=batch.names, uniforms_N=uniforms_N)
                captured.add(kept, batch.num_tokens)
                on_tokens(batch.num_tokens)
            self._write(job, job.targets, captured.joined(), writer)

    def _write(self, job: ShardJob, targets: Sequence[TeacherTarget], captured: Captured, writer: WriteBehind) -> None:
        """Encode targets of all rows of a job, and hand them over to be committed."""
        # One shard waits for the disk at most: memory is bounded, and a full disk is met before the next shard's work.
        writer.flush()
        for target in targets:
            code = self._code(target)
            column = target.describe(ModelSizes(self._parts.hidden_size, self._parts.vocab_size), code)
            by = Encoding(
                column=column,
                code=code,
                uniforms=RowUniforms(job.row_ids, job.lengths),
                device=self._parts.device,
            )
            try:
                host = {array: to_numpy(values) for array, values in target.encode(captured, by).items()}
            except OverflowError as error:
                raise RecipeError(
                    f"column {target.name} cannot be stored: {error}; use another encoding, such as bfloat16 or int8"
                ) from None
            writer.write(job.shard, column, host, num_tokens=job.num_tokens, num_rows=len(job.rows))

    def _code(self, target: TeacherTarget) -> TransformCode | None:
        """Return a target's transform code on the teacher's device, which it is brought to once."""
        code = self._constants.code(target)
        return None if code is None else self._codes.setdefault(target.name, code.to(self._parts.device))

    def _batches(self, job: ShardJob) -> Iterator["Batch"]:
        ids = read_column(self._store, self._manifest.record(job.shard, TOKENS))["ids"].astype(np.int64)
        lengths, row_ids = job.lengths, job.row_ids
        rows = torch.from_numpy(ids).split(lengths)
        names = [
            self._row_names.get(row, f"row {position} of shard {job.shard}") for position, row in enumerate(row_ids)
        ]
        # Never across shards: a shard that is computed again runs in the same batches, and rounds alike.
        for start in range(0, len(rows), self._batch_size):
            chosen = slice(start, start + self._batch_size)
            yield Batch(list(rows[chosen]), RowUniforms(row_ids[chosen], lengths[chosen]), names[chosen])


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
    names: list[str]

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
