"""Hold what a store keeps against its teacher, run again over some of the rows, and against the teacher's own noise.

Checksums say that bytes are those that were written; this says that they are what the teacher gives. Nobody runs a
model twice to the same bits in another batch, so the teacher runs twice here: each row alone, and rows side by side.
How far these two differ is the noise, and a column is held to the error that it states and ten times that.
Shapes: N positions of a batch's rows, K stored tokens, D width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from tqdm import tqdm

from coldstill.cache.errors import IdentityError, IncompleteError
from coldstill.cache.inventory import choose_stores
from coldstill.cache.manifest import Manifest
from coldstill.cache.reader import Reader
from coldstill.cache.row_lines import RowLines
from coldstill.cache.rows import read_rows
from coldstill.cache.selections import Selection, make_selection
from coldstill.cache.store import Store, open_store, store_path
from coldstill.cache.tokens import TOKENS
from coldstill.pipeline.models import ModelParts, resolve_folder, text_config
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.recipe.sections import TeacherConfig
from coldstill.pipeline.runtime.errors import ModelError
from coldstill.pipeline.stage_one.capture import capture
from coldstill.pipeline.targets.captured import union_of
from coldstill.pipeline.targets.kinds import stored_targets
from coldstill.pipeline.targets.live_errors import Comparison, Difference, Live
from coldstill.pipeline.targets.stored_constants import StoredConstants
from coldstill.pipeline.targets.target import TeacherTarget

_BATCH_ROWS = 8
# Tokens that one row is stretched by: no multiple of what kernels cut their work into, which would hide the noise.
_STRETCH = 7


@dataclass(frozen=True)
class ColumnError:
    """How far a stored column is from the teacher.

    Attributes:
        column: Its name.
        measure: What error and noise are: `variance share`, over the channels of a position; `nats`, an absolute
            difference; or `KL in nats`, of the rebuilt distribution from the live one, at temperature 1.
        num_positions: Positions that were compared.
        mean: Of the errors.
        largest: Of the errors.
        noise_mean: The same measure between two live runs.
        noise_largest: Likewise.
        stated: The error that the column states of itself.
        worst: Row and position that come nearest to what is allowed, or go farthest beyond.
        is_within: Whether every element is within what is stated, ten times the noise, and rounding.
    """

    column: str
    measure: str
    num_positions: int
    mean: float
    largest: float
    noise_mean: float
    noise_largest: float
    stated: str
    worst: str
    is_within: bool


@dataclass(frozen=True)
class LiveCheck:
    """What a live check found.

    Attributes:
        store: The store's folder or URL.
        teacher: The folder of the teacher that ran.
        num_rows: Rows that it ran over, twice.
        num_tokens: Tokens of these.
        columns: The error of each column.
        unchecked: Columns of the store that none of these rows has.
    """

    store: str
    teacher: str
    num_rows: int
    num_tokens: int
    columns: list[ColumnError]
    unchecked: list[str]

    @property
    def is_within(self) -> bool:
        """Whether every column is within what it states."""
        return all(column.is_within for column in self.columns)


@torch.inference_mode()
def live_check(
    root: str,
    *,
    store: str | None = None,
    num_rows: int,
    teacher_path: str | None = None,
    device: str = "auto",
    show_progress: bool = True,
) -> LiveCheck:
    """Run the teacher again over rows spread evenly over a store, and compare what is stored of them.

    Args:
        root: The root.
        store: The store's name or the beginning of it, where there are several.
        num_rows: How many rows; all where the store has no more.
        teacher_path: The teacher's folder or hub name; what the store names where it is None.
        device: Where the teacher runs.
        show_progress: Whether to show a progress bar.

    Raises:
        StoreError: There is no such store, or nothing in it to compare.
        IdentityError: The teacher is another one than the store's.
        ModelError: The teacher is not at hand.
    """
    (name,) = choose_stores(root, store, just_one=True)
    opened = open_store(store_path(root, name))
    manifest = Manifest(opened)
    groups = _choose_rows(opened, manifest, num_rows)
    teacher = _find_teacher(opened, teacher_path, device)
    targets = list(dict.fromkeys(target for _, of_group in groups for target in of_group))
    comparison = _comparison(opened, manifest, teacher, targets)
    tallies = {target: _Tally() for target in targets}
    selections = [selection for selection, _ in groups]
    num_tokens = sum(selection.num_tokens for selection in selections)
    with tqdm(total=num_tokens, unit="tok", unit_scale=True, desc="live", disable=not show_progress) as bar:
        for selection, of_group in groups:
            for batch in _read_batches(opened, selection, [target.name for target in of_group]):
                for target, live in _run_twice(teacher.parts, batch, of_group).items():
                    stored = [
                        {array: values.to(teacher.device) for array, values in row[target.name].items()}
                        for row in batch.stored
                    ]
                    tallies[target].add(target.compare(stored, live, comparison), batch)
                bar.update(sum(batch.lengths))
    return LiveCheck(
        store=opened.path,
        teacher=str(teacher.folder),
        num_rows=sum(map(len, selections)),
        num_tokens=num_tokens,
        columns=[
            tallies[target].finish(target, _stated_text(manifest, target.name))
            for target in sorted(targets, key=lambda target: target.name)
        ],
        unchecked=[target.name for target in stored_targets(manifest) if target not in tallies],
    )


def _choose_rows(store: Store, manifest: Manifest, num_rows: int) -> list[tuple[Selection, tuple[TeacherTarget, ...]]]:
    """Take rows spread evenly over those of which the store has more than tokens, by the targets that they have."""
    stored = stored_targets(manifest)
    complete = {
        shard: tuple(target for target in stored if (shard, target.name) in manifest)
        for shard in manifest.shards(TOKENS)
    }
    known = read_rows(store)
    shards = pa.array(sorted(shard for shard, targets in complete.items() if targets), pa.string())
    usable = known.filter(pc.is_in(known["shard"].cast(pa.string()), value_set=shards))
    if not len(usable):
        raise IncompleteError(f"store {store.path} has no row to compare with its teacher; run: coldstill precompute")
    count = min(num_rows, len(usable))
    chosen = usable.take([(2 * index + 1) * len(usable) // (2 * count) for index in range(count)])
    targets_of_rows = [complete[shard] for shard in chosen["shard"].to_pylist()]
    groups = []
    for targets in dict.fromkeys(targets_of_rows):
        rows = chosen.take([index for index, own in enumerate(targets_of_rows) if own == targets])
        groups.append((make_selection(RowLines.of_tables([rows]), [()] * len(rows), {}), targets))
    return groups


def _find_teacher(store: Store, path: str | None, device: str) -> Teacher:
    """Locate the store's teacher and hold its identity against the store's."""
    identity, name = store.teacher["identity"], str(store.teacher["name"])
    if path is None:
        try:
            path = str(resolve_folder(name, revision=store.teacher.get("revision")))
        except ModelError:
            raise ModelError(f"the store's teacher {name} is not at hand; name its folder with --teacher") from None
    teacher = Teacher.locate(TeacherConfig(path=path, dtype=identity["dtype"], device=device))
    for part, stored in identity.items():
        if teacher.identity[part] != stored:
            raise IdentityError(
                f"store {store.path} was made with another teacher than {path}: {part} {stored[:12]} there, "
                f"{teacher.identity[part][:12]} now; name the folder of {name} with --teacher"
            )
    return teacher


def _comparison(store: Store, manifest: Manifest, teacher: Teacher, targets: Sequence[TeacherTarget]) -> Comparison:
    """Bring what the store holds once, calibrations and output head, to the teacher's device."""
    constants, head = StoredConstants(store, manifest), teacher.parts.output_head
    codes = {name: code.to(teacher.device) for name, code in constants.codes(targets).items()}
    stored_head = constants.head(teacher.device) if any(target.needs_stored_head for target in targets) else head
    corrections = {target.name: target.correction(stored_head, codes.get(target.name)) for target in targets}
    return Comparison(
        head=head,
        stored_head=stored_head,
        codes=codes,
        corrections={name: values for name, values in corrections.items() if values is not None},
        dtype=head.weight_VD.dtype,
    )


@dataclass(frozen=True)
class _Batch:
    """Some rows as they are stored: token ids, arrays by column for each row, and what errors call each row."""

    tokens: list[Tensor]
    stored: list[dict[str, dict[str, Tensor]]]
    names: list[str]

    @property
    def lengths(self) -> list[int]:
        return list(map(len, self.tokens))

    def place(self, index: int) -> str:
        """Say which row and position one of the batch's positions is."""
        for name, length in zip(self.names, self.lengths, strict=True):
            if index < length:
                return f"{name}, position {index}"
            index -= length
        raise IndexError(index)


def _read_batches(store: Store, selection: Selection, names: Sequence[str]) -> Iterator[_Batch]:
    """Read the selection's rows; those of a batch come from all over it."""
    reader = Reader(store, selection, [TOKENS, *names])
    num_batches = -(-len(selection) // _BATCH_ROWS)
    for first in range(num_batches):
        indices = range(first, len(selection), num_batches)
        rows = reader.rows(indices)
        shards = [selection.shard_names[selection.shard_numbers[index]] for index in indices]
        positions = [int(selection.positions[index]) for index in indices]
        yield _Batch(
            tokens=[torch.from_numpy(row[TOKENS]["ids"].astype(np.int64)) for row in rows],
            stored=[
                {
                    name: {array: torch.from_numpy(values.copy()) for array, values in row[name].items()}
                    for name in names
                }
                for row in rows
            ],
            names=[f"row {row} of shard {shard}" for row, shard in zip(positions, shards, strict=True)],
        )


@dataclass
class _Tally:
    """Gathers one column's differences over batches."""

    count: int = 0
    positions: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0])
    largest: list[float] = field(default_factory=lambda: [0.0, 0.0])
    excess: float = -float("inf")
    worst: str = ""

    def add(self, difference: Difference, batch: _Batch) -> None:
        if not len(difference.error):
            return
        self.count += difference.error.numel()
        self.positions += len(difference.error)
        for index, values in enumerate((difference.error, difference.noise)):
            self.sums[index] += float(values.sum())
            self.largest[index] = max(self.largest[index], float(values.max()))
        place = int(difference.excess_P.argmax())
        excess = float(difference.excess_P[place])
        if not excess <= self.excess:  # NaN is the worst of all
            self.excess = excess
            self.worst = batch.place(int(difference.kept_N.nonzero()[place]))

    def finish(self, target: TeacherTarget, stated: str) -> ColumnError:
        mean, noise_mean = (total / max(self.count, 1) for total in self.sums)
        return ColumnError(
            column=target.name,
            measure=target.measure,
            num_positions=self.positions,
            mean=mean,
            largest=self.largest[0],
            noise_mean=noise_mean,
            noise_largest=self.largest[1],
            stated=stated,
            worst=self.worst,
            is_within=self.excess <= 0.0,
        )


def _run_twice(parts: ModelParts, batch: _Batch, targets: Sequence[TeacherTarget]) -> dict[TeacherTarget, Live]:
    """Return what each target is held against: each row run alone, and all side by side in the other order.

    Beside them stands one row more, of another length, so that shapes differ and there is padding in any case.
    """
    request = union_of(target.live_needs for target in targets)
    single = [
        capture(parts, [row], request, row_names=[name]) for row, name in zip(batch.tokens, batch.names, strict=True)
    ]
    rows = [*batch.tokens[::-1], _row_of_another_length(parts, batch)]
    many = capture(parts, rows, request, row_names=[*batch.names[::-1], batch.names[0]])
    lengths = [len(row) for row in rows]
    return {
        target: (
            torch.cat([target.live_values(captured) for captured in single]),
            torch.cat(target.live_values(many).split(lengths)[:-1][::-1]),
        )
        for target in targets
    }


def _row_of_another_length(parts: ModelParts, batch: _Batch) -> Tensor:
    """Return a row a little longer than all; where the teacher reads no longer ones, a shorter one."""
    longest = max(batch.tokens, key=len)
    limit = getattr(text_config(parts.model.config), "max_position_embeddings", None)
    stretched = torch.cat([longest, longest[:1].repeat(_STRETCH)])
    return stretched if limit is None or len(stretched) <= limit else longest[: -(-len(longest) // 2)]


def _stated_text(manifest: Manifest, column: str) -> str:
    shard = min(manifest.shards(column))
    return str(manifest.record(shard, column).column.attributes.get("error", "none"))
