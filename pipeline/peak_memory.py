"""The most memory that this process has held: on its accelerator where it has one, in RAM elsewhere."""

import resource
import sys

import torch


def peak_memory_bytes() -> int:
    """Give the peak in bytes: what was allocated on the current accelerator, or the process's resident set."""
    if torch.accelerator.is_available() and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
