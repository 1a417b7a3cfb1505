"""No memory left: how such an error is told from others, and what a user is told then.

torch raises a class of its own where a GPU's allocator finds no room, and plain RuntimeErrors where a CPU's does, where
Apple's does, and where others fill the GPU before the first allocation. Whoever turns errors of libraries into errors
of a recipe or a model lets all of these pass: no word of the recipe is wrong, and the command line has better advice.
"""

import re

from coldstill.pipeline.runtime.units import format_size

_BY_CPU = re.compile(r"DefaultCPUAllocator: .*?tried to allocate (\d+) bytes", re.DOTALL)
_BY_ACCELERATOR = re.compile(r"out of memory|STATUS_ALLOC_FAILED")
_SMALLER = "take smaller batches (teacher.batch_size, train.per_device_train_batch_size, evaluate.batch_size)"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an accelerator, or the machine itself, has no memory left."""
    if isinstance(error, RuntimeError):
        return bool(_BY_CPU.search(str(error)) or _BY_ACCELERATOR.search(str(error)))
    return isinstance(error, MemoryError)


def out_of_memory_line(error: BaseException) -> str:
    """Say in a line what found no memory, and what to make smaller."""
    if not isinstance(error, RuntimeError):
        said = str(error).strip().rstrip(".")  # numpy says how much it wanted, Python nothing
        return f"this machine is out of memory{f': {said}' if said else ''}; {_SMALLER}"
    if of_cpu := _BY_CPU.search(str(error)):
        return f"this machine is out of memory: {format_size(int(of_cpu[1]))} could not be allocated; {_SMALLER}"
    said = str(error).splitlines()[0].partition(". ")[0]
    return f"{said}; {_SMALLER}, or cpu as teacher.device or evaluate.device"
