"""The most memory that this process has held: on its GPU where it used one, in RAM elsewhere."""

import gc
import resource
import sys

import torch


def peak_memory_bytes() -> int:
    """Return the peak in bytes: what was allocated on the current GPU, or the process's resident set."""
    of_gpu = int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0
    if of_gpu:
        return of_gpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_memory() -> None:
    """Return back what models that are gone still hold of a GPU, so that another process can have it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
