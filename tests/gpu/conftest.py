"""What is tested on a GPU alone; where there is none, that is said, and nothing else."""

import pytest
import torch

WHY = "this machine has no GPU that torch knows: what is right on one is not tested here"


@pytest.fixture(autouse=True)
def _on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip(WHY)
