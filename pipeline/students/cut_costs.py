"""Which decoder blocks a model misses least, one after the other, by what it predicts without them.

A block's influence on the stream (`coldstill.pipeline.students.depth`) is known from one run; what the model makes of a
stream that lacks it, only from running the blocks behind it. That is done here, on few positions: what stands in front
of a candidate is the same for all candidates behind it, so each is run from its own place on.

Shapes: B rows, T positions, N positions that count, C of a chunk, D channels, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from coldstill.pipeline.models import ModelParts
from coldstill.pipeline.models.block_calls import BlockCall, block_calls, why_not_alone
from coldstill.pipeline.models.forward import padded_batches
from coldstill.pipeline.runtime.errors import ModelError

# Positions that candidates are judged on, and how many of a row. What they are worth is measured: docs/results.md.
POSITIONS = 512
_OF_A_ROW = 128
# Candidates whose logits are held against the teacher's at a time, whose own are computed once for all of them.
_TOGETHER = 4
# Of what the last cut cost: by how much the cost of every other block has grown with it at least. On SmolLM2-135M it
# was 0.6 to 1.3 of it.
_LEAST_GROWTH = 0.5
_DIGITS = 4  # of costs, as a record keeps them


@dataclass(frozen=True)
class CutRound:
    """One block that went, and what the others would have cost in its place.

    Attributes:
        removed: The block.
        costs: By block, KL(whole model || model without it and those that went before), in nats a token. Blocks that
            were out of the question by what they cost before are not among them.
    """

    removed: int
    costs: dict[int, float]

    def record(self) -> dict[str, Any]:
        """Return it as a record keeps it: JSON-able, null for a cost that is no number."""
        kl = {str(block): round(cost, _DIGITS) if math.isfinite(cost) else None for block, cost in self.costs.items()}
        return {"removed": self.removed, "kl": kl}


@torch.inference_mode()
def cheapest_cuts(
    parts: ModelParts, rows: Sequence[Tensor], *, remove: int, show_progress: bool = True
) -> list[CutRound]:
    """Remove the block whose absence changes the model's predictions least, again and again; of equal ones the later.

    The model is left as it was. Measured on the first positions of the rows, over the whole vocabulary, in float32.

    Args:
        parts: The model.
        rows: Calibration rows of token ids, [T] each.
        remove: How many blocks go.
        show_progress: Whether to show a progress bar.

    Raises:
        ModelError: The model's blocks do more than one can see from outside.
    """
    if why := why_not_alone(parts, rows[0]):
        raise ModelError(
            f"student.prune.layers.method is kl, but {type(parts.model).__name__} cannot be run without some block: "
            f"{why}; use method importance"
        )
    cut = _CutModel(parts, _first_positions(rows))
    # What each block costs at least: the lower, the earlier it is measured.
    bounds = dict.fromkeys(range(len(parts.blocks)), -math.inf)
    rounds: list[CutRound] = []
    cost = 0.0
    total = sum(len(bounds) - already for already in range(remove))
    with tqdm(total=total, unit="block", desc="blocks to cut", disable=not show_progress) as bar:
        for _ in range(remove):
            costs = _measure(cut, bounds, bar)
            removed = min(costs, key=lambda block: (costs[block], -block))
            growth = costs[removed] - cost
            cost = costs[removed]
            rounds.append(CutRound(removed, dict(sorted(costs.items()))))
            cut.remove(removed)
            bounds = {
                block: costs.get(block, bound) + _LEAST_GROWTH * growth
                for block, bound in bounds.items()
                if block != removed
            }
    return rounds


def _measure(cut: "_CutModel", bounds: dict[int, float], bar: "tqdm[None]") -> dict[int, float]:
    """Return the costs of all blocks but those that would cost more than the cheapest, by what they cost at least."""
    costs: dict[int, float] = {}
    queue = sorted(bounds, key=lambda block: (bounds[block], -block))
    for start in range(0, len(queue), _TOGETHER):
        least = min(costs.values(), default=math.inf)
        together = [block for block in queue[start : start + _TOGETHER] if bounds[block] <= least]
        states_ND = []
        for block in together:
            states_ND.append(cut.last_state(without=block))
            bar.update()
        costs |= zip(together, cut.divergences(states_ND), strict=True)
    bar.update(len(queue) - len(costs))
    return costs


def _first_positions(rows: Sequence[Tensor]) -> list[Tensor]:
    """Return the beginnings of as many rows as give the positions to measure on."""
    taken: list[Tensor] = []
    left = POSITIONS
    for row in rows:
        if left > 0:
            taken.append(row[: min(_OF_A_ROW, left)])
            left -= len(taken[-1])
    return taken


@dataclass
class _Batch:
    """A few rows in a model that loses blocks.

    Attributes:
        mask_BT: Which positions are real.
        calls: How each block is called over them.
        streams_BTD: In front of each block, in the model as far as it is cut.
    """

    mask_BT: Tensor
    calls: list[BlockCall]
    streams_BTD: list[Tensor]


class _CutModel:
    """A model that is run without some of its blocks, over the same rows each time."""

    def __init__(self, parts: ModelParts, rows: Sequence[Tensor]) -> None:
        self._parts = parts
        self._gone: set[int] = set()
        self._batches: list[_Batch] = []
        for ids_BT, mask_BT in padded_batches(rows, parts.model):
            entered_BTD, calls = block_calls(parts, ids_BT, mask_BT)
            self._batches.append(_Batch(mask_BT, calls, [entered_BTD] * len(parts.blocks)))
        self._advance(0)
        self._whole_ND = self.last_state()

    def remove(self, block: int) -> None:
        """Let one more block go."""
        self._gone.add(block)
        self._advance(block)

    def last_state(self, *, without: int | None = None) -> Tensor:
        """Return the state [N, D] that the output head reads, where one more block is skipped."""
        states_ND, num_blocks = [], len(self._parts.blocks)
        for batch in self._batches:
            stream_BTD = batch.streams_BTD[num_blocks - 1 if without is None else without]
            for block in range(num_blocks - 1 if without is None else without + 1, num_blocks):
                stream_BTD = self._behind(batch, block, stream_BTD)
            states_ND.append(self._normed(stream_BTD)[batch.mask_BT])
        return torch.cat(states_ND)

    def divergences(self, states_ND: Sequence[Tensor]) -> list[float]:
        """Return the mean KL(whole model || other) of last states, in nats a token: infinite where it is no number."""
        head = self._parts.output_head
        sums = [0.0] * len(states_ND)
        for chunk in head.chunks(len(self._whole_ND)):
            log_p_CV = head(self._whole_ND[chunk]).log_softmax(dim=-1)
            p_CV = log_p_CV.exp()
            negative_entropy_C = torch.einsum("cv,cv->c", p_CV, log_p_CV)
            for index, state_ND in enumerate(states_ND):
                logits_CV = head(state_ND[chunk])
                cross_C = logits_CV.logsumexp(dim=-1) - torch.einsum("cv,cv->c", p_CV, logits_CV)
                sums[index] += float((negative_entropy_C + cross_C).double().sum())
        # Of models that predict alike, rounding may leave less than nothing.
        return [max(total, 0.0) / len(self._whole_ND) if math.isfinite(total) else math.inf for total in sums]

    def _advance(self, start: int) -> None:
        """Bring the streams behind a block up to date, one block after the other."""
        for batch in self._batches:
            for block in range(start, len(self._parts.blocks) - 1):
                batch.streams_BTD[block + 1] = self._behind(batch, block, batch.streams_BTD[block])

    def _behind(self, batch: _Batch, block: int, stream_BTD: Tensor) -> Tensor:
        if block in self._gone:
            return stream_BTD
        return batch.calls[block].run(self._parts.blocks[block], stream_BTD)

    def _normed(self, stream_BTD: Tensor) -> Tensor:
        norm = self._parts.final_norm
        return stream_BTD if norm is None else norm(stream_BTD)
