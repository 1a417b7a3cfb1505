"""How a teacher's weights lie in memory: all of them, two blocks at a time, or spread over several devices."""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from coldstill.pipeline.models.loading import text_config
from coldstill.pipeline.models.machine import free_bytes
from coldstill.pipeline.models.tensor_files import stored_tensors
from coldstill.pipeline.recipe.sections import Placement, TeacherConfig
from coldstill.pipeline.runtime.errors import RecipeError
from coldstill.pipeline.runtime.units import format_size

# Of the memory that is free, what a whole teacher's weights may take beside the work on them.
_SHARE_OF_FREE = 0.8
_OF_A_LIST = re.compile(r"(.*?)\.(\d+)\.")
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class WeightBytes:
    """What a model's weights take in the dtype that it runs in.

    Attributes:
        total: All of them.
        largest_block: Its largest decoder block.
        others: Embedding, output head and norms: all that is in no block.
        num_blocks: How many blocks there are.
    """

    total: int
    largest_block: int
    others: int
    num_blocks: int

    @property
    def streamed(self) -> int:
        """What is in memory while blocks stream in: the one at work, the one that is read, and what is in no block."""
        return 2 * self.largest_block + self.others

    @classmethod
    def of(cls, folder: Path, config: PreTrainedConfig, *, dtype: str | None) -> "WeightBytes":
        """Read them off the headers of a folder's safetensors files.

        Args:
            folder: Where its files are.
            config: Its config.
            dtype: What it computes in; None where its weights stay in memory as they are in the files.

        Raises:
            ModelError: A file is missing or damaged.
        """
        size: int | None = None if dtype is None else getattr(torch, dtype).itemsize
        lists: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        total = 0
        for name, tensor in stored_tensors(folder).items():
            if size is not None and tensor.dtype.startswith(("F", "BF")):
                num_bytes = tensor.num_values * size
            else:
                num_bytes = tensor.num_bytes
            total += num_bytes
            if found := _OF_A_LIST.match(name):
                lists[found[1]][int(found[2])] += num_bytes
        # Of several numbered lists, such as an encoder of images beside them, the blocks are the most.
        blocks = max(lists.values(), key=lambda of_list: sum(of_list.values()), default={0: 0})
        num_blocks = int(text_config(config).num_hidden_layers)
        return cls(total, max(blocks.values()), total - sum(blocks.values()), num_blocks)


def choose_placement(
    section: TeacherConfig, weights: WeightBytes, device: torch.device, *, quantisation: str | None
) -> Placement:
    """Decide where `auto` leaves it open: whole, unless the weights do not fit into what memory is free.

    They are loaded on the host, whole, before they go to an accelerator.
    """
    if section.placement != "auto":
        return section.placement
    fits = all(weights.total <= _SHARE_OF_FREE * free_bytes(place) for place in {device, _HOST})
    return "whole" if fits or quantisation is not None else "streamed"


def check_placement(
    section: TeacherConfig,
    placement: Placement,
    weights: WeightBytes,
    device: torch.device,
    *,
    quantisation: str | None,
) -> None:
    """Refuse a placement that cannot be on this machine.

    Args:
        section: The recipe's.
        placement: What was chosen.
        weights: What the teacher takes.
        device: Where it runs.
        quantisation: What its weights are quantised by; None where they are not.

    Raises:
        RecipeError: It cannot be; says why, and what can.
    """
    if placement == "spread":
        _check_several_devices()
    if placement != "streamed":
        return
    key = f"teacher.placement is {section.placement}"
    if quantisation is not None:
        raise RecipeError(
            f"{key}, but the teacher's weights are quantised by {quantisation}, and only transformers reads those, all "
            "of them: use whole or spread"
        )
    free = free_bytes(device)
    if weights.streamed > free:
        raise RecipeError(
            f"{key}, and {device} has {format_size(free)} free: too little for two of the teacher's blocks "
            f"({format_size(weights.largest_block)} each) beside its embedding and output head "
            f"({format_size(weights.others)}); use more memory, or a teacher.dtype of fewer bytes"
        )


def _check_several_devices() -> None:
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if count < 2:
        has = "no accelerator" if count == 0 else "one accelerator"
        raise RecipeError(
            f"teacher.placement is spread, over several accelerators, and this machine has {has}: use auto, whole or "
            "streamed"
        )
