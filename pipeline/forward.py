"""What it takes to run any decoder over rows: rows laid side by side, block outputs caught by hooks.

Shapes: B rows, T positions, D width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_BATCH = 4
_IGNORED = -100


@contextmanager
def block_outputs(blocks: nn.ModuleList, wanted: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the outputs of some decoder blocks, by block, while the context is open; the hooks go with it."""
    outputs: dict[int, Tensor] = {}

    def keep(block: int) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, _args: object, output: object) -> None:
            outputs[block] = block_output(output)

        return blocks[block].register_forward_hook(hook)

    handles = [keep(block) for block in wanted]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def pad_rows(rows: Sequence[Tensor], *, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Lay rows of token ids side by side: ids [B, T], 0 behind each row's end, and the mask [B, T] of real ones."""
    lengths_B = torch.tensor([len(row) for row in rows])
    ids_BT = nn.utils.rnn.pad_sequence([row.long() for row in rows], batch_first=True)
    mask_BT = torch.arange(ids_BT.shape[1]) < lengths_B.unsqueeze(1)
    return ids_BT.to(device), mask_BT.to(device)


def padded_batches(rows: Sequence[Tensor], *, device: torch.device | str) -> Iterator[tuple[Tensor, Tensor]]:
    """Give a few rows of token ids at a time, as `pad_rows` lays them."""
    for start in range(0, len(rows), _BATCH):
        yield pad_rows(rows[start : start + _BATCH], device=device)


@torch.inference_mode()
def mean_loss(model: Any, rows: Sequence[Tensor]) -> float:
    """Give a causal language model's mean cross entropy over rows of token ids [T], in nats a token."""
    device = next(model.parameters()).device
    total, num_tokens = 0.0, 0
    for ids_BT, mask_BT in padded_batches(rows, device=device):
        labels_BT = ids_BT.masked_fill(~mask_BT, _IGNORED)
        count = int(mask_BT[:, 1:].sum())
        loss = model(input_ids=ids_BT, attention_mask=mask_BT.long(), labels=labels_BT, use_cache=False).loss
        total, num_tokens = total + float(loss) * count, num_tokens + count
    return total / num_tokens


def block_output(output: Any) -> Tensor:
    """Give the hidden state of what a decoder block returned: a tensor, or a tuple or list that begins with it."""
    return output[0] if isinstance(output, tuple | list) else output


def block_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Give the hidden state that a decoder block is called with, by place or by name."""
    return args[0] if args else kwargs["hidden_states"]
