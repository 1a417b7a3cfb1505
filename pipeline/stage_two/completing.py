"""What a batch must have before it trains, whoever made it: labels, weights that are some, and where it counts.

All of it is settled where a batch is made, in the memory of the host: later it would have to be asked of the GPU.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from coldstill.pipeline.models.counted import COUNTED, COUNTED_STATES, places_of
from coldstill.pipeline.models.labels import IGNORED, counts_of, labels_of, weights_of
from coldstill.pipeline.runtime.errors import DataError
from coldstill.pipeline.targets.encodings import STORED

# What a batch may hold, of whichever dataset and collator.
TARGET_KEYS = ("logits", "hidden")
PLACE_KEYS = (COUNTED, COUNTED_STATES)
BATCH_KEYS = ("input_ids", "labels", "weights", "attention_mask", "position_ids", *TARGET_KEYS)


def complete_batch(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return an ordinary batch with its labels, the token ids themselves where it has none.

    Where it has `weights`, one for each token as labels are, a label is `IGNORED` where its weight is 0. One that says
    where it counts is complete.

    Raises:
        DataError: It has no token ids, labels or weights of another shape, weights that are no weights, or what would
            be left out without a word.
    """
    if COUNTED in batch:
        return dict(batch)
    unknown = [name for name in batch if name not in BATCH_KEYS]
    if unknown or "input_ids" not in batch:
        raise DataError(
            f"a batch holds {', '.join(batch) or 'nothing'}; training takes input_ids, and labels, weights, "
            "attention_mask and position_ids with them: leave the rest out of the dataset, or out of what its collator "
            "gives"
        )
    complete = {**batch, "labels": labels_of(batch)}
    if weights_of(complete) is None:
        return complete
    weights_BT = batch["weights"]
    if not bool((weights_BT.isfinite() & (weights_BT >= 0)).all()):
        raise DataError("a batch has weights that are negative or not finite; expected numbers of at least 0")
    return {**complete, "labels": complete["labels"].masked_fill(weights_BT == 0, IGNORED)}


@dataclass(frozen=True)
class Completing:
    """A collator whose batches are complete, and say where they count; those that cannot be come as they are.

    Attributes:
        collate: Any collator.
    """

    collate: Callable[[Any], Any]

    def __call__(self, rows: Any) -> Any:
        """Return the batch of some rows."""
        batch = self.collate(rows)
        try:
            return with_places(complete_batch(batch))
        except DataError:
            return batch  # it is refused where the error is seen whole: not in a reader's process


def with_places(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a complete batch, in the memory of the host, with the places at which it counts."""
    counts_BT = counts_of(batch)
    places = {COUNTED: places_of(counts_BT)}
    for arrays in (batch.get("hidden") or {}).values():
        if STORED in arrays:
            # Of every block, at the same positions.
            places[COUNTED_STATES] = places_of(counts_BT & arrays[STORED].bool())
            break
    return {**batch, **places}
