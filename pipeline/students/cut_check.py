"""Compare a model that was cut in depth with the original whose other blocks are skipped.

A block's arithmetic may depend on its index, on the number of blocks, or on what another block gave it, in ways that no
list of architectures tells. So a few tokens run through both, block by block, before a cut model is used.

Shapes: T positions, D width.
"""

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coldstill.pipeline.models import ModelParts, text_config
from coldstill.pipeline.models.forward import block_input
from coldstill.pipeline.runtime.errors import ModelError
from coldstill.pipeline.runtime.out_of_memory import is_out_of_memory
from coldstill.pipeline.students.layer_patterns import period_keys
from coldstill.pipeline.students.model_copies import load_state

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
            problem = "which is not there"
        elif name not in shapes:
            problem = "which there would be no place for"
        elif weights[name].shape != shapes[name]:
            problem = f"which would be {list(shapes[name])}, and is {list(weights[name].shape)}"
        else:
            continue
        index, weight = _place(name, parts.blocks_name)
        where = "what is around the blocks" if index == sys.maxsize else f"block {kept_blocks[index]} as block {index}"
        keys = period_keys(text_config(parts.model.config).to_dict())
        by = f" (its config says which block is of which kind by {', '.join(keys)})" if keys else ""
        raise ModelError(_refusal(parts, kept_blocks, f"{where} is another by its {weight}, {problem}{by}"))
    load_state(student, weights)


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
    ids = _probe(parts.model)
    removed = [block for block in range(len(parts.blocks)) if block not in kept_blocks]
    with _entering(parts.blocks, skipped=removed) as streams:
        expected = parts.model(input_ids=ids, use_cache=False).logits
    wanted = [streams[block] for block in kept_blocks]
    try:
        with _entering(blocks, instead=wanted) as got:
            logits = student(input_ids=ids, use_cache=False).logits
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        problem = f"a model of that config does not run ({_first_line(error)})"
        raise ModelError(_refusal(parts, kept_blocks, problem)) from None
    if not _is_same(got[0], wanted[0], wanted[0]):
        raise ModelError(_refusal(parts, kept_blocks, "another stream would enter its first block"))
    ends = [(got[index], wanted[index], wanted[index] - wanted[index - 1]) for index in range(1, len(blocks))]
    for index, end in enumerate([*ends, (logits, expected, expected)]):
        if not _is_same(*end) or not _is_same_kind(blocks[index], parts.blocks[kept_blocks[index]]):
            raise ModelError(_refusal(parts, kept_blocks, _other_block(parts, blocks, kept_blocks, index)))


@torch.no_grad()
def warn_without_cache(parts: ModelParts, student: PreTrainedModel) -> None:
    """Warn of a cut model that cannot generate with a cache though the original can.

    transformers asks an attention block how long a cache is; a hybrid may have lost its only one.
    """
    problem = _cache_problem(student)
    if problem is not None and _cache_problem(parts.model) is None:
        warnings.warn(
            f"the student has lost what {type(parts.model).__name__} needs to generate with a cache ({problem}): "
            "generate with use_cache=False, or keep one of its attention blocks",
            stacklevel=2,
        )


def _cache_problem(model: PreTrainedModel) -> str | None:
    try:
        model(input_ids=_probe(model), use_cache=True)
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _probe(model: PreTrainedModel) -> Tensor:
    """Return a row of different token ids [1, T]."""
    config = text_config(model.config)
    num_tokens = min(_PROBE_TOKENS, getattr(config, "max_position_embeddings", None) or _PROBE_TOKENS)
    return torch.arange(1, num_tokens + 1, device=model.device).remainder(config.vocab_size).unsqueeze(0)


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
            if isinstance(output, tuple | list):
                return type(output)([streams[index], *output[1:]])
            return streams[index]

        handles.append(blocks[index].register_forward_hook(skip))
    try:
        yield streams
    finally:
        for handle in handles:
            handle.remove()


def _with_stream(args: tuple[Any, ...], kwargs: dict[str, Any], stream: Tensor) -> tuple[Any, dict[str, Any]]:
    return ((stream, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": stream})


def _is_same_kind(cut: nn.Module, block: nn.Module) -> bool:
    """Whether two blocks are made of the same, but for tensors and for numbers, which may be their index."""
    modules = dict(block.named_modules())
    return all(
        type(module) is type(modules[name]) and _words(module) == _words(modules[name])
        for name, module in cut.named_modules()
        if name in modules
    )


def _words(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in _plain(module).items() if not _is_number(value)}


def _plain(module: nn.Module) -> dict[str, Any]:
    plain = (bool, int, float, str, type(None))
    return {key: value for key, value in vars(module).items() if isinstance(value, plain) and not key.startswith("_")}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _other_block(parts: ModelParts, blocks: nn.ModuleList, kept_blocks: Sequence[int], index: int) -> str:
    """Say that a block of a cut model is another, and by what, where that shows."""
    block = kept_blocks[index]
    cut = dict(blocks[index].named_modules())
    for name, module in parts.blocks[block].named_modules():
        if name not in cut:
            continue
        if type(module) is not type(cut[name]):
            by = f"its {name}, which would be a {type(cut[name]).__name__}, and is a {type(module).__name__}"
            return f"block {block} as block {index} is another by {by}"
        now = _plain(cut[name])
        for key, value in _plain(module).items():
            other = now.get(key)
            is_index = _is_number(value) and _is_number(other) and value - other == block - index
            if other != value and not is_index:
                by = f"its {f'{name}.{key}'.lstrip('.')}, which would be {other}, and is {value}"
                return f"block {block} as block {index} is another by {by}"
    return f"block {block} does not compute the same as block {index}"


def _place(name: str, blocks_name: str) -> tuple[int, str]:
    """Return the block of a weight and its name in it; the largest number and its whole name for one in no block."""
    if not name.startswith(f"{blocks_name}."):
        return sys.maxsize, name
    block, _, rest = name.removeprefix(f"{blocks_name}.").partition(".")
    return int(block), rest


def _refusal(parts: ModelParts, kept_blocks: Sequence[int], problem: str) -> str:
    removed = [block for block in range(len(parts.blocks)) if block not in kept_blocks]
    numbers = ", ".join(map(str, removed))
    name = type(parts.model).__name__
    return f"{name} cannot be cut by block{'s' * (len(removed) > 1)} {numbers}: {problem}; {OTHER_CUTS}"
