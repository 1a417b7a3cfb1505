"""Teacher batches that pass a teacher's blocks together: what `capture` keeps of each, kept block by block. No I/O.

Shapes: B rows, T positions, N real positions of all rows, D width.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from coldstill.pipeline.models import ModelParts, rope_switches
from coldstill.pipeline.models.forward import Place
from coldstill.pipeline.models.machine import free_bytes
from coldstill.pipeline.models.passage import Passage
from coldstill.pipeline.stage_one.capture import LaidBatch, capture, capture_end
from coldstill.pipeline.targets.captured import Captured, CaptureRequest

# Of the memory that is free, what batches that wait for each other may take.
SHARE_OF_FREE = 0.5
_HOST = torch.device("cpu")


class SuperBatch:
    """Batches that pass one block of a teacher before any of them enters the next.

    Args:
        parts: The teacher.
        num_tokens: Of all batches.
    """

    def __init__(self, parts: ModelParts, num_tokens: int) -> None:
        self._parts = parts
        self._num_tokens = num_tokens
        self._wait_at: torch.device | None = None
        self.bytes_per_token = 0.0

    def batch(self, rows: Sequence[Tensor], names: Sequence[str]) -> "StreamedBatch":
        """Put a batch in front of the first block."""
        return StreamedBatch(self, self._parts, rows, names)

    def wait_at(self) -> torch.device:
        """Return where a batch waits: on the teacher's device; on the host, where there is no room for all batches."""
        return self._parts.device if self._wait_at is None else self._wait_at

    def measure(self, passage: Passage, num_tokens: int) -> None:
        """Note what a batch of so many tokens holds while it waits: by the first one it is decided where all do."""
        if self._wait_at is None:
            self.bytes_per_token = passage.num_bytes / num_tokens
            needed = self.bytes_per_token * self._num_tokens
            device = self._parts.device
            self._wait_at = device if needed <= SHARE_OF_FREE * free_bytes(device) else _HOST

    def affordable_tokens(self) -> int:
        """Return how many tokens may wait for each other, by what these hold and what memory is free now."""
        return int(SHARE_OF_FREE * free_bytes(_HOST) / self.bytes_per_token)


class StreamedBatch:
    """A batch of a super-batch.

    Args:
        together: The super-batch.
        parts: The teacher.
        rows: Token ids of its rows, [T] each.
        names: How errors name each.
    """

    def __init__(self, together: SuperBatch, parts: ModelParts, rows: Sequence[Tensor], names: Sequence[str]) -> None:
        self.num_tokens = sum(map(len, rows))
        self._together = together
        self._head = parts.output_head
        self._laid = LaidBatch.lay(parts, rows, names)
        self._passage = Passage(parts, self._laid.inputs, rope_switches(parts.model.config))

    def step(self, index: int, wanted: Collection[Place]) -> dict[Place, Tensor]:
        """Pass the next block, and return the stream [N, D] at those wanted places that are beside it.

        Raises:
            NonFiniteError: A value of it is NaN or infinite; names row, block and position.
        """
        streams = self._passage.step(index, wait_at=self._together.wait_at())
        self._together.measure(self._passage, self.num_tokens)
        return {
            place: self._laid.real_positions(stream_BTD, f"block {place}")
            for place, stream_BTD in streams.items()
            if place in wanted
        }

    def end(self, request: CaptureRequest, *, uniforms_N: Tensor | None = None) -> Captured:
        """Keep what is asked of the last state and its logits, behind all blocks.

        Raises:
            NonFiniteError: A value is NaN or infinite; names row and position.
        """
        state_BTD = self._passage.last_state()
        return capture_end(self._head, self._laid, state_BTD, request, hidden_ND={}, uniforms_N=uniforms_N)


def capture_all(
    parts: ModelParts,
    batches: Sequence[tuple[Sequence[Tensor], Sequence[str]]],
    request: CaptureRequest,
    *,
    on_tokens: Callable[[float], object],
) -> list[Captured]:
    """Capture the same of batches of rows, which pass a teacher together where it streams in.

    Args:
        parts: The teacher.
        batches: The rows of each, [T] each, and how errors name them.
        request: What to keep; no draws.
        on_tokens: Told of tokens as they are done.

    Raises:
        NonFiniteError: A value is NaN or infinite; names row, block and position.
    """
    if parts.loader is None:
        kept = []
        for rows, names in batches:
            kept.append(capture(parts, rows, request, row_names=names))
            on_tokens(sum(map(len, rows)))
        return kept
    together = SuperBatch(parts, sum(len(row) for rows, _ in batches for row in rows))
    under_way = [together.batch(rows, names) for rows, names in batches]
    hidden_ND: list[dict[Place, Tensor]] = [{} for _ in under_way]
    for index in range(len(parts.blocks)):
        for batch, kept_ND in zip(under_way, hidden_ND, strict=True):
            kept_ND |= batch.step(index, request.blocks)
            on_tokens(batch.num_tokens / len(parts.blocks))
    return [replace(batch.end(request), hidden_ND=kept_ND) for batch, kept_ND in zip(under_way, hidden_ND, strict=True)]
