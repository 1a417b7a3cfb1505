"""Rows of logits a few at a time: what passes over a row several times then finds it in the processor's cache."""

from collections.abc import Iterator

from torch import Tensor

# Fits into the caches of a few cores, and is long enough for two threads.
BLOCK_BYTES = 4 << 20


def row_blocks(logits_CV: Tensor) -> Iterator[slice]:
    """Cut rows into blocks that stay in cache; on a GPU, where each block would be another launch, into one."""
    num_rows = len(logits_CV)
    length = max(BLOCK_BYTES // (4 * logits_CV.shape[-1]), 1) if logits_CV.device.type == "cpu" else max(num_rows, 1)
    for start in range(0, num_rows, length):
        yield slice(start, start + length)
