"""What chance decides of a row, decided by the row itself: the same whenever and beside whatever it is run."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowUniforms:
    """Numbers in [0, 1) for each position of some rows.

    Attributes:
        row_ids: What `coldstill.cache.identity.row_id` gives of each row.
        lengths: Tokens of each.
    """

    row_ids: Sequence[bytes]
    lengths: Sequence[int]

    def draw(self, purpose: str) -> Tensor:
        """Draw a number for each position, [N] in float32, a function of its row and the purpose alone."""
        return torch.cat(
            [_uniforms(row, length, purpose) for row, length in zip(self.row_ids, self.lengths, strict=True)]
        )


def _uniforms(row: bytes, length: int, purpose: str) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(row + purpose.encode()).digest()[:8], "little", signed=True)
    return torch.rand(length, generator=torch.Generator().manual_seed(seed))
