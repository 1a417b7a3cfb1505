"""Compute what one shard lacks: teacher batches, encodings on the teacher's device, columns handed to their writer.

Batches never straddle a shard and depend on nothing but the shard and the batch size, so a shard that is computed again
has the same bytes.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from coldstill.cache.arrays import read_column
from coldstill.cache.columns import Column
from coldstill.cache.manifest import Manifest
from coldstill.cache.store import Store
from coldstill.cache.tokens import TOKENS
from coldstill.pipeline.models import ModelParts
from coldstill.pipeline.runtime.errors import RecipeError
from coldstill.pipeline.stage_one.capture import Captured, CaptureRequest, capture, join_parts
from coldstill.pipeline.stage_one.write_behind import WriteBehind
from coldstill.pipeline.targets.column_specs import describe_column
from coldstill.pipeline.targets.columns import (
    FINAL_PREFIX,
    LABEL_LOGIT,
    TAIL_PREFIX,
    Tail,
    TargetColumns,
    hidden_block,
    logsumexp_name,
    state_form,
    topk_size,
)
from coldstill.pipeline.targets.encodings import encode_state, to_numpy
from coldstill.pipeline.targets.token_encodings import encode_tail, encode_topk
from coldstill.pipeline.targets.transform_coding import TransformCode
from torch import Tensor

OnTokens = Callable[[int], None]

# A shard's states wait on an accelerator up to so many bytes.
_WAITING_BYTES = 1 << 30
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class ShardJob:
    """Columns to compute for one shard.

    Attributes:
        shard: Its name.
        rows: Its rows as `coldstill.cache.rows.shard_rows` gives them.
        columns: The names of what is missing.
    """

    shard: str
    rows: pa.Table
    columns: tuple[str, ...]

    def without(self, manifest: Manifest) -> "ShardJob":
        """Give the job without the columns that are complete by now."""
        return replace(self, columns=tuple(name for name in self.columns if (self.shard, name) not in manifest))

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
        targets: The columns of the recipe, by the name of each.
        codes: The transform code of each coded column, by its name.
        batch_size: Rows of a teacher batch.
        row_names: How errors name a row, by its id; others are named by their place in the shard.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        parts: ModelParts,
        targets: Sequence[TargetColumns],
        *,
        codes: Mapping[str, TransformCode],
        batch_size: int,
        row_names: Mapping[bytes, str],
    ) -> None:
        self._store = store
        self._manifest = manifest
        self._parts = parts
        self._batch_size = batch_size
        self._row_names = row_names
        self._device = next(parts.model.parameters()).device
        self._codes = {name: code.to(self._device) for name, code in codes.items()}
        self._temperatures = {logsumexp_name(value): value for columns in targets for value in columns.temperatures}

    def run(self, job: ShardJob, writer: WriteBehind, on_tokens: OnTokens) -> None:
        """Compute the columns of a job and hand them over to be committed; reports tokens as they are done."""
        captured = []
        request = self._request(job)
        waits_on = self._waiting_place(request, job.num_tokens)
        for batch in self._batches(job):
            uniforms_N = torch.cat(
                [_uniforms(row, len(ids), "tail") for row, ids in zip(batch.ids, batch.rows, strict=True)]
            )
            kept = capture(self._parts, batch.rows, request, row_names=batch.names, uniforms_N=uniforms_N)
            captured.append(kept.to(waits_on))
            on_tokens(len(uniforms_N))
        whole = _concatenate(captured)
        sizes = {"width": self._parts.hidden_size, "vocab_size": self._parts.vocab_size}
        writer.flush()  # one shard waits for the disk at most
        for name in job.columns:
            column = describe_column(name, codes=self._codes, **sizes)
            host = {array: to_numpy(values) for array, values in self._encode(column, whole, job).items()}
            writer.write(job.shard, column, host, num_tokens=job.num_tokens, num_rows=len(job.rows))

    def _waiting_place(self, request: CaptureRequest, num_tokens: int) -> torch.device:
        """Say where a shard's states wait for its statistics: beside the teacher, or on the host if they are many."""
        num_states = len(request.blocks) + request.final_state
        num_bytes = num_tokens * num_states * self._parts.hidden_size * self._parts.model.dtype.itemsize
        return self._device if num_bytes <= _WAITING_BYTES else _HOST

    def _batches(self, job: ShardJob) -> Iterator["_Batch"]:
        ids = read_column(self._store, self._manifest.record(job.shard, TOKENS))["ids"].astype(np.int64)
        rows = torch.from_numpy(ids).split(job.lengths)
        row_ids = job.row_ids
        names = [
            self._row_names.get(row, f"row {position} of shard {job.shard}") for position, row in enumerate(row_ids)
        ]
        for start in range(0, len(rows), self._batch_size):
            chosen = slice(start, start + self._batch_size)
            yield _Batch(list(rows[chosen]), row_ids[chosen], names[chosen])

    def _request(self, job: ShardJob) -> CaptureRequest:
        blocks = {hidden_block(name) for name in job.columns}
        tails = [Tail.parse(name) for name in job.columns if name.startswith(TAIL_PREFIX)]
        return CaptureRequest(
            blocks=tuple(sorted(block for block in blocks if block is not None)),
            ks=tuple(sorted({topk_size(name) for name in job.columns} - {0})),
            temperatures=tuple(self._temperatures[name] for name in job.columns if name in self._temperatures),
            labels=LABEL_LOGIT in job.columns,
            final_state=any(name.startswith(FINAL_PREFIX) for name in job.columns),
            tails=tuple(tails),
        )

    def _encode(self, column: Column, captured: Captured, job: ShardJob) -> dict[str, Tensor]:
        name = column.name
        try:
            if form := state_form(name):
                block = hidden_block(name)
                state_ND = _present(captured.final_state_ND) if block is None else captured.hidden_ND[block]
                stored_N = None
                if form.fraction < 1.0:
                    # The same positions for every block, a function of the row alone.
                    rows = zip(job.row_ids, job.lengths, strict=True)
                    uniforms_N = torch.cat([_uniforms(row, length, "hidden") for row, length in rows])
                    stored_N = uniforms_N.to(self._device) < form.fraction
                state_ND = state_ND.to(self._device)
                return encode_state(state_ND, form=form, code=self._codes.get(name), stored_N=stored_N)
            if k := topk_size(name):
                return encode_topk(*captured.top_NK[k], column=column)
            if name.startswith(TAIL_PREFIX):
                return encode_tail(*captured.tail_NM[Tail.parse(name)], column=column)
        except OverflowError as error:
            raise RecipeError(
                f"column {name} cannot be stored: {error}; use another encoding, such as bfloat16 or int8"
            ) from None
        if name == LABEL_LOGIT:
            return {"values": _present(captured.label_logit_N)}
        return {"values": captured.logsumexp_N[self._temperatures[name]]}


@dataclass(frozen=True)
class _Batch:
    """Rows of a teacher batch: their token ids, their row ids, and how errors name them."""

    rows: list[Tensor]
    ids: list[bytes]
    names: list[str]


def _uniforms(row: bytes, length: int, purpose: str) -> Tensor:
    """Give a number in [0, 1) for each position of a row, a function of the row and the purpose alone."""
    seed = int.from_bytes(hashlib.sha256(row + purpose.encode()).digest()[:8], "little", signed=True)
    return torch.rand(length, generator=torch.Generator().manual_seed(seed))


def _concatenate(batches: Sequence[Captured]) -> Captured:
    first = batches[0]

    def joined(take: Callable[[Captured], Tensor | None]) -> Tensor | None:
        values = [value for value in map(take, batches) if value is not None]
        return torch.cat(values) if values else None

    return Captured(
        hidden_ND={block: torch.cat([batch.hidden_ND[block] for batch in batches]) for block in first.hidden_ND},
        final_state_ND=joined(lambda batch: batch.final_state_ND),
        top_NK={k: join_parts([batch.top_NK[k] for batch in batches]) for k in first.top_NK},
        label_logit_N=joined(lambda batch: batch.label_logit_N),
        logsumexp_N={key: torch.cat([batch.logsumexp_N[key] for batch in batches]) for key in first.logsumexp_N},
        tail_NM={tail: join_parts([batch.tail_NM[tail] for batch in batches]) for tail in first.tail_NM},
    )


def _present(values: Tensor | None) -> Tensor:
    assert values is not None, "the capture request asked for what the job's columns need"
    return values
