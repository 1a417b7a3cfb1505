"""The terms over block outputs in one pass over the mapped pairs: two pairs' states exist at once, and no more.

Shapes: B rows, T positions, N positions that count and are stored, Ds and Dt widths of student and teacher.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from coldstill.pipeline.losses.state_losses import BlockScales
from coldstill.pipeline.losses.term import BlockTerm, StatePair
from coldstill.pipeline.models.counted import at

StoredStates = Mapping[str, Mapping[str, Tensor]]


class HiddenForm(Protocol):
    """How a batch's block outputs are read; `coldstill.pipeline.targets.forms` has it."""

    @property
    def stored_share(self) -> float:
        """The share of positions that are stored."""
        ...

    def decode(self, stored: StoredStates, block: int) -> Tensor:
        """Return a teacher block's output, [B, T, Dt] in float32."""
        ...


@dataclass(frozen=True)
class MappedStates:
    """The outputs of mapped blocks on both sides; the teacher's are decoded when their pair's turn comes.

    Attributes:
        layer_map: Student block to teacher block, in the student's order.
        outputs: The student's output [B, T, Ds] of each mapped block.
        stored: The teacher's, by block as text, as they are stored.
        form: How they are stored.
        places_N: The places of the positions that count and are stored; the same for every block.
        weights_BT: What each position weighs, float32; None where each weighs 1.
        scales: Of the teacher's blocks, for terms that are measured by them.
    """

    layer_map: Mapping[int, int]
    outputs: Mapping[int, Tensor]
    stored: StoredStates
    form: HiddenForm
    places_N: Tensor
    weights_BT: Tensor | None = None
    scales: BlockScales = field(default_factory=BlockScales)

    def pairs(self) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
        """Return, pair by pair, the student block as text, its states [N, Ds], the teacher's [N, Dt] and the weights.

        All in float32; the weights [N], None where each position weighs 1.
        """
        weights_N = None if self.weights_BT is None else at(self.weights_BT, self.places_N)
        for student_block, teacher_block in self.layer_map.items():
            with torch.no_grad():
                teacher_ND = at(self.form.decode(self.stored, teacher_block), self.places_N)
            # The student's state may be bfloat16 under autocast; the projector's weights are float32.
            own_ND = at(self.outputs[student_block], self.places_N).float()
            yield str(student_block), own_ND, teacher_ND, weights_N


def block_losses(
    terms: Sequence[BlockTerm], states: MappedStates, projectors: nn.ModuleDict, *, num_positions: Tensor | float
) -> dict[str, Tensor]:
    """Return each term by its name, a mean over pairs, with its gradient; none where there is nothing to compare.

    Args:
        terms: The terms.
        states: Of student and teacher.
        projectors: By student block as text.
        num_positions: What sums over positions are divided by; of positions stored at random, their share of it.
    """
    divisor = num_positions * states.form.stored_share
    losses: dict[str, list[Tensor]] = {term.name: [] for term in terms}
    before: StatePair | None = None
    for block, own_ND, teacher_ND, weights_N in states.pairs():
        scales = (of.get(int(block)) for of in (states.scales.states, states.scales.changes))
        pair = StatePair(projectors[block](own_ND), teacher_ND, weights_N, *scales)
        for term in terms:
            loss = term.loss(pair, before)
            if loss is not None:
                losses[term.name].append(loss / divisor)
        before = pair
    return {name: torch.stack(values).mean() for name, values in losses.items() if values}
