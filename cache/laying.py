"""Rows into shards: which of a run's rows a store knows already, where the others go, and where each of them lies.

Rows are matched by their ids in parts that fit into memory, however many there are.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow.compute as pc

from coldstill.cache.errors import StoreNotFoundError
from coldstill.cache.identity import ROW_ID_BYTES, shard_id
from coldstill.cache.records import Parts, Records
from coldstill.cache.row_lines import LINE, ROW_ID, RowLines, id_array, line_of_rows, ranks_of, sorted_lines
from coldstill.cache.store import Store

SHARD_TOKENS = 32_768

WANTED = np.dtype([("row", ROW_ID), ("length", "<i4")])
# A row of the run, or where the index is -1, one that the store knows.
_EITHER = np.dtype([("index", "<i8"), *LINE.descr])
# Where a row lies; where the shard is -1, it lies nowhere yet, and `first` is the first place where the run has it.
_PLACE = np.dtype([("index", "<i8"), ("first", "<i8"), ("shard", "<i4"), ("position", "<i4"), ("start", "<i4")])


class WantedRows(Protocol):
    """The rows of a run, in order; one may occur more than once."""

    def __len__(self) -> int: ...

    def slices(self) -> Iterator[np.ndarray]:
        """Yield their ids and lengths, of dtype `WANTED`, a slice at a time; as often as it is asked."""


def wanted_rows(row_ids: Sequence[bytes], lengths: Sequence[int]) -> WantedRows:
    """Return rows that are few: what `coldstill.cache.identity.row_id` gave, and the number of tokens of each."""
    return Records.of(list(zip(row_ids, lengths, strict=True)), WANTED)


@dataclass(frozen=True)
class LaidRows:
    """Rows that a store did not know, shard after shard; nothing of them is published yet.

    Attributes:
        rows: Their lines.
        indices: Which row of the run each of them is, int64.
    """

    rows: RowLines
    indices: Records

    def __len__(self) -> int:
        return len(self.rows)

    def shards(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Yield each shard's name, its lines and their indices."""
        start = 0
        for shard, lines in self.rows.shards():
            yield shard, lines, self.indices.read(start, start + len(lines))
            start += len(lines)


def lay_rows(known: Sequence[RowLines], shards: Collection[str], wanted: WantedRows) -> LaidRows:
    """Lay rows that the store does not know into shards.

    The caller commits the new shards' tokens and then publishes the lines. A shard whose tokens were lost is laid again
    as it was, where all of its rows are asked for.

    Args:
        known: The lines of all rows that were ever laid.
        shards: The shards whose tokens are committed.
        wanted: The rows of the run.
    """
    places = _places(known, shards, wanted)
    laid = LaidRows(RowLines(), Records("<i8"))
    restored = _restore(laid, _lost_lines(known, shards), wanted, places)
    filling = _Filling(laid)
    for rows, found in _beside(wanted, places):
        if (rows["length"] < 1).any():
            raise ValueError("a row needs at least one token")
        is_new = (found["shard"] < 0) & (found["first"] == found["index"])
        if restored:
            is_new &= [row.tobytes() not in restored for row in rows["row"]]
        filling.add(rows[is_new], found["index"][is_new])
    filling.finish()
    return laid


def places_of_rows(store: Store, known: Sequence[RowLines], shards: Collection[str], wanted: WantedRows) -> RowLines:
    """Find the place of each row of a run, in its order.

    Raises:
        StoreNotFoundError: The store does not know one of them.
    """
    names = _names(known)
    places = _places(known, shards, wanted)
    num_lacking = sum(int((found["shard"] < 0).sum()) for found in places.slices())
    if num_lacking:
        raise StoreNotFoundError(
            f"store {store.path} lacks {num_lacking} of {len(wanted)} rows; run: coldstill precompute"
        )
    lines_in_order = RowLines()
    for rows, found in _beside(wanted, places):
        lines = np.empty(len(rows), LINE)
        # Shards are numbered in the order in which the run comes to them.
        used, first, numbers = np.unique(found["shard"], return_index=True, return_inverse=True)
        own = np.empty(len(used), np.int32)
        for place in np.argsort(first):
            own[place] = lines_in_order.number_of(names[used[place]])
        lines["shard"] = own[numbers]
        for name in ("position", "start"):
            lines[name] = found[name]
        lines["row"], lines["length"] = rows["row"], rows["length"]
        lines_in_order.lines.append(lines)
    return lines_in_order


def lines_behind_one_another(shard: str, wanted: WantedRows) -> RowLines:
    """Return the lines that rows have where all of them lie in one shard, also those that occur more than once."""
    laid = RowLines()
    number, position, start = laid.number_of(shard), 0, 0
    for rows in wanted.slices():
        lines = line_of_rows(number, rows["row"], rows["length"])
        lines["position"] += position
        lines["start"] += start
        laid.lines.append(lines)
        position, start = position + len(rows), start + int(rows["length"].sum())
    return laid


class _Filling:
    """Fills shards greedily, in order, up to `SHARD_TOKENS`; a longer row has a shard of its own."""

    def __init__(self, laid: LaidRows) -> None:
        self._laid = laid
        self._rows: list[bytes] = []
        self._lengths: list[int] = []
        self._indices: list[int] = []
        self._room = 0

    def add(self, rows: np.ndarray, indices: np.ndarray) -> None:
        for row, length, index in zip(
            id_array(rows["row"]).to_pylist(), rows["length"].tolist(), indices.tolist(), strict=True
        ):
            if length > self._room:
                self.finish()
                self._room = SHARD_TOKENS
            self._rows.append(row)
            self._lengths.append(length)
            self._indices.append(index)
            self._room -= length

    def finish(self) -> None:
        if self._rows:
            joined = b"".join(self._rows)
            _append(
                self._laid, shard_id([joined]), np.frombuffer(joined, ROW_ID), self._lengths, np.array(self._indices)
            )
        self._rows, self._lengths, self._indices = [], [], []


def _append(laid: LaidRows, shard: str, rows: np.ndarray, lengths: Sequence[int], indices: np.ndarray) -> None:
    laid.rows.lines.append(line_of_rows(laid.rows.number_of(shard), rows, np.array(lengths, np.int32)))
    laid.indices.append(indices)


def _restore(laid: LaidRows, lost: RowLines, wanted: WantedRows, places: Records) -> set[bytes]:
    """Lay shards without tokens again as they were, where all of their rows are asked for; gives these rows' ids."""
    if not len(lost):
        return set()
    # What is lost is what damage left, and little.
    of_lost = id_array(np.concatenate([lines["row"] for _, lines in lost.shards()]))
    asked: dict[bytes, int] = {}
    for rows, found in _beside(wanted, places):
        rows, found = rows[found["shard"] < 0], found[found["shard"] < 0]
        is_lost = pc.is_in(id_array(rows["row"]), value_set=of_lost).to_numpy(zero_copy_only=False)
        for row, first in zip(
            id_array(rows["row"][is_lost]).to_pylist(), found["first"][is_lost].tolist(), strict=True
        ):
            asked.setdefault(row, first)
    restored: set[bytes] = set()
    for shard, lines in lost.shards():
        members = id_array(lines["row"]).to_pylist()
        if all(row in asked for row in members):
            indices = np.array([asked.pop(row) for row in members])
            _append(laid, shard, lines["row"], lines["length"].tolist(), indices)
            restored.update(members)
    return restored


def _lost_lines(known: Sequence[RowLines], shards: Collection[str]) -> RowLines:
    """Return the lines of shards without tokens."""
    lost = []
    for part in known:
        if not set(part.names).issubset(shards):
            own = RowLines()
            own.names = part.names
            is_lost = np.array([name not in shards for name in part.names])
            for lines in part.lines.slices():
                own.lines.append(lines[is_lost[lines["shard"]]])
            lost.append(own)
    return sorted_lines(lost)


def _beside(wanted: WantedRows, places: Records) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the rows of a run, a slice at a time, with the places that were found for them."""
    start = 0
    for rows in wanted.slices():
        yield rows, places.read(start, start + len(rows))
        start += len(rows)


def _names(known: Sequence[RowLines]) -> list[str]:
    return sorted({name for part in known for name in part.names})


def _places(known: Sequence[RowLines], shards: Collection[str], wanted: WantedRows) -> Records:
    """Find where each row of a run lies, by shard and position the first place where there are several; see `_PLACE`.

    The numbers of shards are those of `_names`.
    """
    num_wanted = len(wanted)
    mixed = _mixed(known, shards, wanted)
    ordered = Parts(_PLACE, num_wanted)
    for both in mixed:
        found = _match(both)
        ordered.append(found["index"] * ordered.count // max(num_wanted, 1), found)
    places = Records(_PLACE)
    for found in ordered:
        places.append(found[np.argsort(found["index"])])
    return places


def _mixed(known: Sequence[RowLines], shards: Collection[str], wanted: WantedRows) -> Parts:
    """Divide the rows of a run, and those that the store has the tokens of, by their ids."""
    mixed = Parts(_EITHER, len(wanted) + sum(map(len, known)))
    names = _names(known)
    has_tokens = np.array([name in shards for name in names], bool)
    for part in known:
        ranks = ranks_of(part, names)
        for lines in part.lines.slices():
            either = np.empty(len(lines), _EITHER)
            for name in LINE.names or ():
                either[name] = lines[name]
            either["index"], either["shard"] = -1, ranks[lines["shard"]]
            _append_by_id(mixed, either[has_tokens[either["shard"]]])
    start = 0
    for rows in wanted.slices():
        either = np.zeros(len(rows), _EITHER)
        either["index"], either["row"] = np.arange(start, start + len(rows)), rows["row"]
        _append_by_id(mixed, either)
        start += len(rows)
    return mixed


def _append_by_id(parts: Parts, either: np.ndarray) -> None:
    beginnings = np.ascontiguousarray(either["row"]).view(np.uint8).reshape(-1, ROW_ID_BYTES)[:, :2].astype(np.int64)
    parts.append((beginnings[:, 0] * 256 + beginnings[:, 1]) * parts.count >> 16, either)


def _match(both: np.ndarray) -> np.ndarray:
    """Find the rows of a run among those that are known, all of them with ids of one part."""
    is_wanted = both["index"] >= 0
    known, wanted = both[~is_wanted], both[is_wanted]
    known = known[np.lexsort((known["position"], known["shard"]))]
    ids = id_array(wanted["row"])
    found = np.empty(len(wanted), _PLACE)
    found["index"] = wanted["index"]
    distinct = ids.dictionary_encode().indices.to_numpy()
    _, firsts = np.unique(distinct, return_index=True)
    found["first"] = wanted["index"][firsts][distinct] if len(wanted) else 0
    lines = pc.index_in(ids, value_set=id_array(known["row"])).fill_null(-1).to_numpy()
    found["shard"], found["position"], found["start"] = -1, 0, 0
    for name in ("shard", "position", "start"):
        found[name][lines >= 0] = known[name][lines[lines >= 0]]
    return found
