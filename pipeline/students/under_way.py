"""Rows on their way through a student and its original, block by block, so that one block of each is at work at a time.

Shapes: B rows, T positions, N positions that count, D channels of the original, K of the student.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from coldstill.pipeline.models import ModelParts
from coldstill.pipeline.models.block_calls import BlockCall, block_calls
from coldstill.pipeline.models.forward import padded_batches
from coldstill.pipeline.students.axes import WRITERS
from coldstill.pipeline.students.interpolation import stretched


@dataclass(frozen=True)
class Span:
    """The original's blocks that one block of a student stands for.

    Attributes:
        start: The first of them, which it was made of.
        end: The one behind the last.
    """

    start: int
    end: int

    @classmethod
    def between(cls, starts: Sequence[int], num_blocks: int) -> list["Span"]:
        """Return the spans of blocks that begin at some of the original's, ascending; the last ends with them all."""
        return [cls(start, end) for start, end in zip(starts, [*starts[1:], num_blocks], strict=True)]


@dataclass(frozen=True)
class Channels:
    """How an original's stream is said in the channels of a student.

    Attributes:
        read: Takes the original's stream [N, D], and gives the student's [N, K].
    """

    read: Callable[[Tensor], Tensor]

    @classmethod
    def kept(cls, channels_K: Tensor | None) -> "Channels":
        """The student has some of the original's channels; all where there is None."""
        return cls(lambda stream_ND: stream_ND if channels_K is None else stream_ND[:, channels_K.to(stream_ND.device)])

    @classmethod
    def interpolated(cls, num_channels: int) -> "Channels":
        """The student's channels lie between the original's, as its weights do."""
        return cls(lambda stream_ND: stretched(stream_ND, 1, num_channels))


@dataclass(frozen=True)
class Aim:
    """Where the stream should be: the original's, in the student's channels, at the positions that count.

    Attributes:
        stream_NK: The stream, float32.
        weights_N: One over its mean square over all of the original's channels: positions count alike, however large
            the stream is there.
    """

    stream_NK: Tensor
    weights_N: Tensor

    @classmethod
    def at(cls, stream_BTD: Tensor, mask_BT: Tensor, channels: Channels) -> "Aim":
        """Aim at an original's stream."""
        stream_ND = stream_BTD[mask_BT].float()
        return cls(channels.read(stream_ND), 1.0 / stream_ND.square().mean(dim=-1).clamp(min=1e-12))

    def error_of(self, stream_NK: Tensor) -> Tensor:
        """Return a stream's mean squared error as a share of the original's mean square, at each position, [N]."""
        return (stream_NK - self.stream_NK).square().mean(dim=-1) * self.weights_N


@dataclass
class RowsUnderWay:
    """A few rows in front of a block of each model; the student's stream is its own, float32.

    Attributes:
        mask_BT: Which positions are real, and count.
        original_BTD: The original's stream in front of its next block, in its dtype.
        student_BTK: The student's, float32.
        original_calls: Of each of the original's blocks.
        student_calls: Of each of the student's, in float32.
        aims: Where the stream should be behind each of `WRITERS` of the block at hand; behind the block alone, the
            last, where a model has no such writers.
    """

    mask_BT: Tensor
    original_BTD: Tensor
    student_BTK: Tensor
    original_calls: list[BlockCall]
    student_calls: list[BlockCall]
    aims: list[Aim] = field(default_factory=list)

    @classmethod
    def begin(cls, student: ModelParts, original: ModelParts, rows: Sequence[Tensor]) -> list["RowsUnderWay"]:
        """Put rows of token ids, [T] each, in front of the first blocks, a few at a time."""
        return [cls._of_batch(student, original, *batch) for batch in padded_batches(rows, original.model)]

    @classmethod
    def _of_batch(cls, student: ModelParts, original: ModelParts, ids_BT: Tensor, mask_BT: Tensor) -> "RowsUnderWay":
        original_BTD, original_calls = block_calls(original, ids_BT, mask_BT)
        student_BTK, student_calls = block_calls(student, ids_BT, mask_BT)
        calls = [call.in_float32() for call in student_calls]
        return cls(mask_BT, original_BTD, student_BTK.float(), original_calls, calls)

    def advance_original(self, original: ModelParts, start: int, end: int) -> None:
        """Run the original's blocks from start to before end."""
        for block in range(start, end):
            self.original_BTD = self.original_calls[block].run(original.blocks[block], self.original_BTD)

    def aim_behind(self, original: ModelParts, span: Span, channels: Channels, *, has_writers: bool) -> None:
        """Run the original's blocks that the student's block at hand stands for, and aim at the stream behind them.

        Args:
            original: The original.
            span: Those blocks; the stream is in front of them.
            channels: How it is said in the student's.
            has_writers: Whether to aim at the stream behind the first writer of the first of them too.
        """
        aims, block = [], span.start
        if has_writers:
            before_BTD = self.original_BTD
            with watching(original.blocks[block], WRITERS[:1]) as seen:
                self.advance_original(original, block, block + 1)
            aims.append(Aim.at(before_BTD + seen.outputs[WRITERS[0]], self.mask_BT, channels))
            block += 1
        self.advance_original(original, block, span.end)
        self.aims = [*aims, Aim.at(self.original_BTD, self.mask_BT, channels)]

    def run_student(self, block: nn.Module, index: int) -> Tensor:
        """Run the student's block at hand on the student's stream, which stays in front of it, [B, T, K]."""
        return self.student_calls[index].run(block, self.student_BTK)


@dataclass
class Seen:
    """What modules of a block read and gave in its last run, by name."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def watching(block: nn.Module, names: Sequence[str]) -> Iterator[Seen]:
    """Note what some modules of a block read and give while the context is open."""
    seen = Seen()

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen.inputs[name], seen.outputs[name] = args[0], output

        return block.get_submodule(name).register_forward_hook(hook)

    handles = [watch(name) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
