"""Compare a model that was cut in depth with the original whose other blocks are skipped.

A block's arithmetic may depend on its index, on the number of blocks, or on what another block gave it, in ways that no
list of architectures tells. So a few tokens run through both, block by block, before a cut model is used.

Shapes: T positions, D width.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cache.errors import ModelError
from pipeline.forward import block_input
from pipeline.models import ModelParts

_PROBE_TOKENS = 24
# Of what a block adds to the stream, in steps of the dtype: how far one that does the same may be from it.
_STEPS = 2
# And of the stream that it is added to, whose rounding falls elsewhere where what is added differs at all.
_STREAM_SHARE = 1 / 16
_LEAST_TOLERANCE = 1e-4
OTHER_CUTS = "remove other blocks, such as the last ones (student.prune.layers.method: last)"


def load_weights(
    parts: ModelParts, student: PreTrainedModel, weights: Mapping[str, Tensor], kept_blocks: Sequence[int]
) -> None:
    """Load a cut model's weights, which must be exactly those that it has.

    Args:
        parts: The original.
        student: The cut model.
        weights: By name.
        kept_blocks: The original's block of each of its own.

    Raises:
        ModelError: A weight is missing, too much, or of another shape; names the first.
    """
    shapes = {name: value.shape for name, value in student.state_dict().items()}
    for name in sorted(shapes.keys() | weights.keys(), key=lambda name: _place(name, parts.blocks_name)):
        if name not in weights:
            problem = f"would need {name}, which the original has not"
        elif name not in shapes:
            problem = f"would have no place for {name}"
        elif weights[name].shape != shapes[name]:
            problem = f"would need {name} as {list(shapes[name])}, and the original's is {list(weights[name].shape)}"
        else:
            continue
        raise ModelError(_refusal(parts, kept_blocks, f"a model of that config {problem}"))
    student.load_state_dict(weights)


@torch.no_grad()
def check_cut(parts: ModelParts, student: PreTrainedModel, kept_blocks: Sequence[int]) -> None:
    """Refuse a cut model whose blocks do not compute what they do in the original when the others are skipped.

    Both are left as they were.

    Args:
        parts: The original.
        student: The cut model.
        kept_blocks: The original's block of each of its own.

    Raises:
        ModelError: A block computes something else; names the first, and what of it is otherwise where that shows.
    """
    blocks = student.get_submodule(parts.blocks_name)
    assert isinstance(blocks, nn.ModuleList)
    ids = torch.arange(1, _PROBE_TOKENS + 1, device=student.device).remainder(parts.vocab_size).unsqueeze(0)
    removed = [block for block in range(len(parts.blocks)) if block not in kept_blocks]
    with _entering(parts.blocks, skipped=removed) as streams:
        expected = parts.model(input_ids=ids, use_cache=False).logits
    wanted = [streams[block] for block in kept_blocks]
    try:
        with _entering(blocks, instead=wanted) as got:
            logits = student(input_ids=ids, use_cache=False).logits
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        problem = f"a model of that config does not run ({type(error).__name__}: {error})"
        raise ModelError(_refusal(parts, kept_blocks, problem)) from None
    if not _is_same(got[0], wanted[0], wanted[0]):
        raise ModelError(_refusal(parts, kept_blocks, "another stream would enter its first block"))
    ends = [(got[index], wanted[index], wanted[index] - wanted[index - 1]) for index in range(1, len(blocks))]
    for index, end in enumerate([*ends, (logits, expected, expected)]):
        if not _is_same(*end) or _kind(blocks[index]) != _kind(parts.blocks[kept_blocks[index]]):
            raise ModelError(_refusal(parts, kept_blocks, _other_block(parts, blocks, kept_blocks, index)))


def _is_same(got: Tensor, expected: Tensor, added: Tensor) -> bool:
    """Whether streams [..., T, D] are the same at each position, up to the rounding of what was added to them."""
    if not bool(torch.isfinite(expected).all()):
        return True  # the capture says where that begins
    tolerance = max(_STEPS * torch.finfo(expected.dtype).eps, _LEAST_TOLERANCE)
    error, added, stream = (value.float().norm(dim=-1) for value in (got - expected, added, expected))
    return bool((error <= tolerance * (added + _STREAM_SHARE * stream)).all())


@contextmanager
def _entering(
    blocks: nn.ModuleList, *, skipped: Sequence[int] = (), instead: Sequence[Tensor] | None = None
) -> Iterator[dict[int, Tensor]]:
    """Collect the stream that enters each block, by block, while the context is open.

    Args:
        blocks: The blocks.
        skipped: Blocks that give on what entered them.
        instead: What each block is to read in place of what entered it.
    """
    streams: dict[int, Tensor] = {}
    handles = []
    for index, block in enumerate(blocks):

        def enter(_block: object, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index) -> Any:
            streams[index] = block_input(args, kwargs).clone()
            return None if instead is None else _with_stream(args, kwargs, instead[index].clone())

        handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
    for index in skipped:

        def skip(_block: object, _args: object, output: Any, index: int = index) -> Any:
            return (streams[index], *output[1:]) if isinstance(output, tuple) else streams[index]

        handles.append(blocks[index].register_forward_hook(skip))
    try:
        yield streams
    finally:
        for handle in handles:
            handle.remove()


def _with_stream(args: tuple[Any, ...], kwargs: dict[str, Any], stream: Tensor) -> tuple[Any, dict[str, Any]]:
    return ((stream, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": stream})


def _kind(block: nn.Module) -> Any:
    """Say what a block is made of, but for its tensors and its numbers, which may be its index."""
    return [
        (name, type(module), {key: None if _is_number(value) else value for key, value in _plain(module).items()})
        for name, module in block.named_modules()
    ]


def _plain(module: nn.Module) -> dict[str, Any]:
    plain = (bool, int, float, str, type(None))
    return {key: value for key, value in vars(module).items() if isinstance(value, plain) and not key.startswith("_")}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _other_block(parts: ModelParts, blocks: nn.ModuleList, kept_blocks: Sequence[int], index: int) -> str:
    """Say that a block of a cut model is another, and what of it, where that shows."""
    block = kept_blocks[index]
    problem = f"block {block} of the original would compute something else as block {index}"
    cut = dict(blocks[index].named_modules())
    for name, module in parts.blocks[block].named_modules():
        if type(module) is not type(cut.get(name)):
            return f"{problem}: its {name} would be a {type(cut.get(name)).__name__}, and is a {type(module).__name__}"
        now = _plain(cut[name])
        for key, value in _plain(module).items():
            is_index = _is_number(value) and _is_number(now.get(key)) and value - now[key] == block - index
            if now.get(key) != value and not is_index:
                return f"{problem}: its {f'{name}.{key}'.lstrip('.')} would be {now.get(key)}, and is {value}"
    return problem


def _place(name: str, blocks_name: str) -> tuple[int, str]:
    """Order names of weights by block, those outside the blocks last."""
    block = name.removeprefix(f"{blocks_name}.").partition(".")[0]
    return (int(block) if name.startswith(f"{blocks_name}.") else sys.maxsize, name)


def _refusal(parts: ModelParts, kept_blocks: Sequence[int], problem: str) -> str:
    removed = [block for block in range(len(parts.blocks)) if block not in kept_blocks]
    numbers = ", ".join(map(str, removed))
    return f"{type(parts.model).__name__} cannot be cut by block{'s' * (len(removed) > 1)} {numbers}: {problem}; {OTHER_CUTS}"
