"""What it takes to run any decoder over rows: rows laid side by side, block outputs caught by hooks.

A row's output is a function of the row alone: rows that a model would turn by other factors for each other's sake are
run apart (`coldstill.pipeline.models.positions`).

Shapes: B rows, T positions, D width.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from coldstill.pipeline.models import rope_switches, rows_by_side, sides
from coldstill.pipeline.models.labels import IGNORED

BATCH_ROWS = 4


@dataclass(frozen=True)
class InputOf:
    """The place in front of a decoder block, where its input is caught; sorted before the place behind it.

    Attributes:
        block: The block's number.
    """

    block: int

    def __lt__(self, other: "Place") -> bool:
        return self.block < other.block if isinstance(other, InputOf) else self.block <= other

    def __gt__(self, other: "Place") -> bool:
        return not self < other and self != other

    def __str__(self) -> str:
        return f"{self.block}'s input"


# Where the residual stream can be caught: behind a decoder block, by the block's number, or in front of one.
Place = int | InputOf
AnyPlace = TypeVar("AnyPlace", bound=Place)


@contextmanager
def block_outputs(blocks: nn.ModuleList, wanted: Sequence[AnyPlace]) -> Iterator[dict[AnyPlace, Tensor]]:
    """Collect the residual stream at some places, by place, while the context is open; the hooks go with it."""
    outputs: dict[AnyPlace, Tensor] = {}

    def keep(place: AnyPlace) -> torch.utils.hooks.RemovableHandle:
        def behind(_module: nn.Module, _args: object, output: object) -> None:
            outputs[place] = block_output(output)

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            outputs[place] = block_input(args, kwargs)

        if isinstance(place, InputOf):
            return blocks[place.block].register_forward_pre_hook(before, with_kwargs=True)
        return blocks[place].register_forward_hook(behind)

    handles = [keep(place) for place in wanted]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def model_inputs(
    input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
) -> dict[str, Any]:
    """Return what a decoder is called with; positions only where there are any, since not every decoder takes them."""
    positions = {} if position_ids is None else {"position_ids": position_ids}
    return {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False, **positions}


def pad_rows(rows: Sequence[Tensor], *, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Lay rows of token ids side by side: ids [B, T], 0 behind each row's end, and the mask [B, T] of real ones."""
    lengths_B = torch.tensor([len(row) for row in rows])
    ids_BT = nn.utils.rnn.pad_sequence([row.long() for row in rows], batch_first=True)
    mask_BT = torch.arange(ids_BT.shape[1]) < lengths_B.unsqueeze(1)
    return ids_BT.to(device), mask_BT.to(device)


def padded_batches(rows: Sequence[Tensor], model: PreTrainedModel) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a few rows at a time that a model may run together, as `pad_rows` lays them, on the model's device."""
    device = next(model.parameters()).device
    switches = rope_switches(model.config)
    for _, group in itertools.groupby(rows, lambda row: sides([len(row)], switches)):
        together = list(group)
        for start in range(0, len(together), BATCH_ROWS):
            yield pad_rows(together[start : start + BATCH_ROWS], device=device)


def run_body(
    body: nn.Module,
    blocks: nn.ModuleList,
    inputs: Mapping[str, Any],
    wanted: Sequence[AnyPlace],
    *,
    switches: Sequence[int],
    take: Callable[[Any], Tensor] = lambda output: output.last_hidden_state,
) -> tuple[dict[AnyPlace, Tensor], Tensor]:
    """Run rows through a model, those on each side of its switches by themselves.

    Args:
        body: Takes token ids.
        blocks: Its decoder blocks.
        inputs: What `model_inputs` gives.
        wanted: Places where to catch the stream.
        switches: What `rope_switches` gives of the model.
        take: What to give of the body's output.

    Returns:
        The stream [B, T, D] by place, and what was taken, [B, T, ...].
    """
    sides_of = RowSides.of(inputs, switches)
    runs = []
    for of_side in sides_of.inputs:
        with block_outputs(blocks, wanted) as outputs:
            runs.append((outputs, take(body(**of_side))))
    outputs = {place: sides_of.join([of_run[place] for of_run, _ in runs]) for place in wanted}
    return outputs, sides_of.join([taken for _, taken in runs])


@dataclass(frozen=True)
class RowSides:
    """A batch, in parts that a model may run: its rows on each side of the model's switches; mostly the batch itself.

    Attributes:
        inputs: Of each part, as `model_inputs` gives them.
        order: Where each row of the batch is among the rows of all parts; None where there is one part.
        num_positions: T of the batch.
    """

    inputs: Sequence[Mapping[str, Any]]
    order: Tensor | None
    num_positions: int

    @classmethod
    def of(cls, inputs: Mapping[str, Any], switches: Sequence[int]) -> "RowSides":
        """Part a batch, given what `rope_switches` gives of the model."""
        groups, num_positions = rows_by_side(inputs, switches), inputs["input_ids"].shape[1]
        if not groups:
            return cls([inputs], None, num_positions)
        order = torch.cat([rows for rows, _ in groups]).argsort()
        return cls([_part(inputs, rows, end) for rows, end in groups], order, num_positions)

    def join(self, of_parts: Sequence[Tensor]) -> Tensor:
        """Lay what came of the parts, [B, T, ...] each, side by side as the batch is."""
        if self.order is None:
            (of_batch,) = of_parts
            return of_batch
        padding = [(0, 0) * (part.dim() - 2) + (0, self.num_positions - part.shape[1]) for part in of_parts]
        padded = [F.pad(part, pad) for part, pad in zip(of_parts, padding, strict=True)]
        return torch.cat(padded)[self.order.to(padded[0].device)]


def _part(inputs: Mapping[str, Any], rows: Tensor, end: int) -> dict[str, Any]:
    return {name: value[rows, :end] if isinstance(value, Tensor) else value for name, value in inputs.items()}


@torch.inference_mode()
def mean_loss(model: Any, rows: Sequence[Tensor]) -> float:
    """Return a causal language model's mean cross entropy over rows of token ids [T], in nats a token."""
    total, num_tokens = 0.0, 0
    for ids_BT, mask_BT in padded_batches(rows, model):
        labels_BT = ids_BT.masked_fill(~mask_BT, IGNORED)
        count = int(mask_BT[:, 1:].sum())
        loss = model(input_ids=ids_BT, attention_mask=mask_BT.long(), labels=labels_BT, use_cache=False).loss
        total, num_tokens = total + float(loss) * count, num_tokens + count
    return total / num_tokens


def what_to_try(dtype: torch.dtype) -> str:
    """Say what to do where a model gave a value that its dtype does not hold."""
    if dtype == torch.float32:
        return "dtype float32, beyond which there is none: use another checkpoint"
    return f"dtype {str(dtype).removeprefix('torch.')}, try {'bfloat16' if dtype == torch.float16 else 'float32'}"


def block_output(output: Any) -> Tensor:
    """Return the hidden state of what a decoder block returned: a tensor, or a tuple or list that begins with it."""
    return output[0] if isinstance(output, tuple | list) else output


def block_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the hidden state that a decoder block is called with, by place or by name."""
    return args[0] if args else kwargs["hidden_states"]
