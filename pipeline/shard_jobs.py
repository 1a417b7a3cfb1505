"""Compute what one shard lacks: teacher batches, encodings, one column after another committed.

Batches never straddle a shard and depend on nothing but the shard and the batch size, so a shard that is computed again
has the same bytes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cache.arrays import read_column
from cache.columns import ArraySpec, Column
from cache.errors import RecipeError
from cache.manifest import Manifest
from cache.store import CONSTANTS, Store
from cache.tokens import TOKENS, token_column
from cache.writer import write_column
from pipeline.capture import Captured, CaptureRequest, capture
from pipeline.encodings import (
    encode_hidden,
    encode_topk,
    hidden_column,
    state_column,
    to_numpy,
    topk_column,
)
from pipeline.models import ModelParts
from pipeline.targets import (
    FINAL_STATE,
    HIDDEN_PREFIX,
    LABEL_LOGIT,
    OUTPUT_HEAD,
    TargetColumns,
    logsumexp_name,
    topk_size,
)

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class ShardJob:
    """Columns to compute for one shard.

    Attributes:
        shard: Its name.
        rows: Its rows as `cache.rows.shard_rows` gives them.
        columns: The names of what is missing.
    """

    shard: str
    rows: pa.Table
    columns: tuple[str, ...]

    def without(self, manifest: Manifest) -> "ShardJob":
        """Give the job without the columns that are complete by now."""
        return replace(self, columns=tuple(name for name in self.columns if (self.shard, name) not in manifest))

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
        batch_size: int,
        row_names: Mapping[bytes, str],
    ) -> None:
        self._store = store
        self._manifest = manifest
        self._parts = parts
        self._batch_size = batch_size
        self._row_names = row_names
        self._hidden_blocks = {name: block for columns in targets for block, name in columns.hidden.items()}
        self._temperatures = {logsumexp_name(value): value for columns in targets for value in columns.temperatures}

    def run(self, job: ShardJob, on_progress: OnProgress) -> None:
        """Compute and commit the columns of a job; reports tokens and bytes as they are done."""
        captured = []
        for batch, names in self._batches(job):
            captured.append(_to_host(capture(self._parts, batch, self._request(job), row_names=names)))
            on_progress(sum(map(len, batch)), 0)
        whole = _concatenate(captured)
        for name in job.columns:
            column = describe_column(name, width=self._parts.hidden_size, vocab_size=self._parts.vocab_size)
            host = {array: to_numpy(values) for array, values in self._encode(column, whole).items()}
            sizes = {"num_tokens": job.num_tokens, "num_rows": len(job.rows)}
            record = write_column(self._store, self._manifest, job.shard, column, host, **sizes)
            on_progress(0, record.stored_bytes)

    def _batches(self, job: ShardJob) -> Iterator[tuple[list[Tensor], list[str]]]:
        ids = read_column(self._store, self._manifest.record(job.shard, TOKENS))["ids"].astype(np.int64)
        rows = torch.from_numpy(ids).split(job.lengths)
        names = [
            self._row_names.get(row, f"row {position} of shard {job.shard}")
            for position, row in enumerate(job.rows["row"].to_pylist())
        ]
        for start in range(0, len(rows), self._batch_size):
            chosen = slice(start, start + self._batch_size)
            yield list(rows[chosen]), names[chosen]

    def _request(self, job: ShardJob) -> CaptureRequest:
        return CaptureRequest(
            blocks=tuple(self._hidden_blocks[name] for name in job.columns if name in self._hidden_blocks),
            k=max(topk_size(name) for name in job.columns),
            temperatures=tuple(self._temperatures[name] for name in job.columns if name in self._temperatures),
            labels=LABEL_LOGIT in job.columns,
            final_state=FINAL_STATE in job.columns,
        )

    def _encode(self, column: Column, captured: Captured) -> dict[str, Tensor]:
        name = column.name
        try:
            if name in self._hidden_blocks:
                state_ND = captured.hidden_ND[self._hidden_blocks[name]]
                return encode_hidden(state_ND, encoding=column.attributes["encoding"])
            if name == FINAL_STATE:
                return encode_hidden(_present(captured.final_state_ND), encoding="float16")
            if k := topk_size(name):
                top_logits, top_ids = _present(captured.top_logits_NK)[:, :k], _present(captured.top_ids_NK)[:, :k]
                return encode_topk(top_logits, top_ids, column=column)
        except OverflowError as error:
            raise RecipeError(
                f"column {name} cannot be stored: {error}; use another encoding, such as bfloat16 or int8"
            ) from None
        if name == LABEL_LOGIT:
            return {"values": _present(captured.label_logit_N)}
        return {"values": captured.logsumexp_N[self._temperatures[name]]}


def describe_column(name: str, *, width: int, vocab_size: int) -> Column:
    """Describe the column of a target by its name, for a teacher of that width and vocabulary."""
    if name == TOKENS:
        return token_column(vocab_size=vocab_size)
    if name.startswith(HIDDEN_PREFIX):
        return hidden_column(name, encoding=name.rsplit("/", 1)[-1], width=width)
    if name == FINAL_STATE:
        return state_column(name, width=width)
    if k := topk_size(name):
        return topk_column(name, k=k, values=name.rsplit("/", 1)[-1], vocab_size=vocab_size)
    return Column(name, {"values": ArraySpec("float32")})


def write_output_head(store: Store, manifest: Manifest, parts: ModelParts) -> None:
    """Keep the output head, bit for bit, so that eval rows' last states give exact logits without the teacher."""
    head = parts.output_head
    dtype = str(head.weight_VD.dtype).removeprefix("torch.")
    vocab_size, width = head.weight_VD.shape
    stored = "uint16" if dtype == "bfloat16" else dtype
    arrays = {"weight": encode_hidden(head.weight_VD.detach(), encoding=dtype)["values"]}
    specs = {"weight": ArraySpec(stored, (vocab_size, width), axis="shard")}
    if head.bias_V is not None:
        arrays["bias"] = encode_hidden(head.bias_V.detach(), encoding=dtype)["values"]
        specs["bias"] = ArraySpec(stored, (vocab_size,), axis="shard")
    column = Column(OUTPUT_HEAD, specs, {"dtype": dtype, "scale": head.scale, "softcap": head.softcap})
    host = {name: to_numpy(values) for name, values in arrays.items()}
    write_column(store, manifest, CONSTANTS, column, host, num_tokens=0, num_rows=0)


def _to_host(captured: Captured) -> Captured:
    """Bring what was kept to the host, where a whole shard waits for its statistics."""

    def host(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.cpu()

    return Captured(
        hidden_ND={block: values.cpu() for block, values in captured.hidden_ND.items()},
        final_state_ND=host(captured.final_state_ND),
        top_logits_NK=host(captured.top_logits_NK),
        top_ids_NK=host(captured.top_ids_NK),
        label_logit_N=host(captured.label_logit_N),
        logsumexp_N={temperature: values.cpu() for temperature, values in captured.logsumexp_N.items()},
    )


def _concatenate(batches: Sequence[Captured]) -> Captured:
    first = batches[0]

    def joined(take: Callable[[Captured], Tensor | None]) -> Tensor | None:
        values = [value for value in map(take, batches) if value is not None]
        return torch.cat(values) if values else None

    return Captured(
        hidden_ND={block: torch.cat([batch.hidden_ND[block] for batch in batches]) for block in first.hidden_ND},
        final_state_ND=joined(lambda batch: batch.final_state_ND),
        top_logits_NK=joined(lambda batch: batch.top_logits_NK),
        top_ids_NK=joined(lambda batch: batch.top_ids_NK),
        label_logit_N=joined(lambda batch: batch.label_logit_N),
        logsumexp_N={key: torch.cat([batch.logsumexp_N[key] for batch in batches]) for key in first.logsumexp_N},
    )


def _present(values: Tensor | None) -> Tensor:
    assert values is not None, "the capture request asked for what the job's columns need"
    return values
