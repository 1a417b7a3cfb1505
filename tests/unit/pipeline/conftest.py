"""Every draw that systematic sampling of a tail can give, and how many positions a chunk of logits has."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from coldstill.pipeline.models import output_head

# Of a row [V], k and temperatures, with the number of draws: uniforms, and the probability of each one's draw.
Cells = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(scope="session")
def cells() -> Cells:
    """Cut [0, 1) where a tooth of the comb passes from one token to the next: within a cell all draws are the same."""

    def cut(row: Tensor, *, k: int, temperatures: tuple[float, ...], num_draws: int) -> tuple[Tensor, Tensor]:
        tail = row.double().scatter(-1, row.topk(k).indices, -torch.inf)
        proposal = torch.stack([(tail / temperature).softmax(-1) for temperature in temperatures]).mean(0)
        ends = torch.cat([(num_draws * proposal.cumsum(-1)) % 1.0, torch.tensor([0.0, 1.0], dtype=torch.float64)])
        ends = ends.sort().values
        widths = ends.diff()
        keep = widths > 1e-9
        return (ends[:-1] + widths / 2)[keep], widths[keep]

    return cut


@pytest.fixture
def chunk_positions(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let output heads cut positions into chunks of so many."""

    def cut(length: int) -> None:
        monkeypatch.setattr(output_head, "CHUNK_BYTES", 0)
        monkeypatch.setattr(output_head, "FEWEST_ROWS", length)

    return cut
