"""A smaller architecture of a teacher's family: how deep and how wide a student of so many parameters is.

Heads keep their number and width; blocks, channels of the residual stream and neurons become fewer.
"""

import math
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from coldstill.pipeline.models import find_parts
from coldstill.pipeline.runtime.errors import ModelError, RecipeError
from coldstill.pipeline.students.axes import mlp_size, parameter_axes
from coldstill.pipeline.students.model_copies import changed_config
from coldstill.pipeline.students.width import NEURON_MULTIPLE

# Numbers of channels that are tried are multiples of the first, or in a narrow model of the second.
_CHANNEL_MULTIPLES = (64, 8)
_NARROW = 512


@dataclass(frozen=True)
class Design:
    """An architecture.

    Attributes:
        num_blocks: Decoder blocks.
        hidden_size: Channels of the residual stream.
        mlp_size: Neurons of each block's MLP.
        num_parameters: What it has in all, a tied head counted once.
    """

    num_blocks: int
    hidden_size: int
    mlp_size: int
    num_parameters: int


def design_student(
    config: PreTrainedConfig, *, parameters: int | None, compression: float | None, shape: str
) -> Design:
    """Choose the architecture nearest to a number of parameters.

    `depth` removes blocks, and narrows only when half of them are gone; `width` narrows channels and neurons alike, and
    removes blocks only when half the width is gone; `balanced` shrinks all three by the same factor. Where it narrows,
    the number of neurons is then fitted to what is still missing.

    Args:
        config: The teacher's.
        parameters: How many the student is to have, or None.
        compression: Or else the share of the teacher's.
        shape: `depth`, `width` or `balanced`.

    Raises:
        ModelError: The teacher's architecture is not one that can be narrowed.
        RecipeError: No such student is smaller than the teacher, or large enough to exist.
    """
    sizes = _Sizes.of_config(config)
    whole = sizes.count(sizes.num_blocks, sizes.hidden_size, sizes.mlp_size)
    wanted = parameters if parameters is not None else round((compression or 1.0) * whole)
    if wanted >= whole:
        raise RecipeError(f"student.init wants {wanted:,} parameters, but the teacher has {whole:,}: nothing to shrink")
    designs = [design for design in _candidates(sizes, shape) if _is_allowed(config, design)]
    if not designs or wanted < 0.9 * min(design.num_parameters for design in designs):
        least = min((design.num_parameters for design in designs), default=whole)
        raise RecipeError(
            f"student.init wants {wanted:,} parameters, but the smallest student of this teacher has {least:,}; its "
            "vocabulary alone holds many of them"
        )
    nearest = min(designs, key=lambda design: abs(design.num_parameters - wanted))
    return nearest if nearest.hidden_size == sizes.hidden_size else sizes.fitted(nearest, wanted)


@dataclass(frozen=True)
class _Sizes:
    """The teacher's sizes, and how its parameters depend on them: a + c h, and for each block a + c h + (a + c h) i."""

    num_blocks: int
    hidden_size: int
    mlp_size: int
    terms: dict[tuple[bool, int, int], float]

    @classmethod
    def of_config(cls, config: PreTrainedConfig) -> "_Sizes":
        with torch.device("meta"):
            parts = find_parts(AutoModelForCausalLM.from_config(config))
        axes = parameter_axes(parts)
        sizes = cls(len(parts.blocks), parts.hidden_size, mlp_size(parts), {})
        for name, value in parts.model.named_parameters():
            num_channels, num_neurons = axes[name].count("channels"), axes[name].count("neurons")
            in_block = name.startswith(f"{parts.blocks_name}.")
            scaled = value.numel() / sizes.hidden_size**num_channels / sizes.mlp_size**num_neurons
            key = (in_block, num_channels, num_neurons)
            sizes.terms[key] = sizes.terms.get(key, 0.0) + scaled / (sizes.num_blocks if in_block else 1)
        return sizes

    def count(self, num_blocks: int, hidden_size: int, mlp_size: int) -> int:
        """Return the number of parameters of a model of these sizes."""
        return round(
            sum(
                factor * hidden_size**channels * mlp_size**neurons * (num_blocks if in_block else 1)
                for (in_block, channels, neurons), factor in self.terms.items()
            )
        )

    def design(self, num_blocks: int, hidden_size: int, mlp_size: float) -> Design:
        """Return the architecture of these sizes, its neurons a multiple of 8 and at most the teacher's."""
        size = round(mlp_size / NEURON_MULTIPLE) * NEURON_MULTIPLE
        size = self.mlp_size if mlp_size >= self.mlp_size else max(NEURON_MULTIPLE, min(size, self.mlp_size))
        return Design(num_blocks, hidden_size, size, self.count(num_blocks, hidden_size, size))

    def fitted(self, design: Design, wanted: int) -> Design:
        """Change the number of neurons so that the parameters come as near as they can."""
        without = self.count(design.num_blocks, design.hidden_size, 0)
        per_neuron = (design.num_parameters - without) / design.mlp_size
        return self.design(design.num_blocks, design.hidden_size, (wanted - without) / per_neuron)


def _candidates(sizes: _Sizes, shape: str) -> list[Design]:
    step = _CHANNEL_MULTIPLES[sizes.hidden_size < _NARROW]
    widths = range((sizes.hidden_size - 1) // step * step, 0, -step)
    num_blocks, half_blocks, half_width = sizes.num_blocks, math.ceil(sizes.num_blocks / 2), sizes.hidden_size / 2
    if shape == "depth":
        pairs = [(blocks, sizes.hidden_size) for blocks in range(num_blocks - 1, half_blocks - 1, -1)]
        pairs += [(half_blocks, width) for width in widths]
    elif shape == "width":
        wide = [width for width in widths if width >= half_width]
        pairs = [(num_blocks, width) for width in wide]
        pairs += [(blocks, wide[-1]) for blocks in range(num_blocks - 1, 0, -1)] if wide else []
    else:
        pairs = [(max(1, round(num_blocks * width / sizes.hidden_size)), width) for width in widths]
    return [sizes.design(blocks, width, sizes.mlp_size * width / sizes.hidden_size) for blocks, width in pairs]


def _is_allowed(config: PreTrainedConfig, design: Design) -> bool:
    try:
        changed_config(config, hidden_size=design.hidden_size)
    except ModelError:
        return False
    return True


def block_positions(num_blocks: int, num_kept: int) -> list[float]:
    """Return where among the blocks each of fewer ones lies: evenly spaced, the first and the last where they are."""
    return [index * (num_blocks - 1) / max(num_kept - 1, 1) for index in range(num_kept)]
