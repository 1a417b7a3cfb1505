"""Which axes of a Llama-like model's weights are the residual stream's channels, the MLP's neurons, attention's heads.

Only what is known by name is cut: a wrong guess would give a model that runs and is broken.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from coldstill.pipeline.models import ModelParts, text_config
from coldstill.pipeline.runtime.errors import ModelError

# Along `queries` lie the heads that ask, along `keys` those that they read, each group of the former with one of these.
Axis = Literal["channels", "neurons", "queries", "keys"] | None

_READER: tuple[Axis, Axis] = (None, "channels")
_OF_MODULES: dict[str, tuple[Axis, Axis]] = {
    "self_attn.q_proj": ("queries", "channels"),
    "self_attn.k_proj": ("keys", "channels"),
    "self_attn.v_proj": ("keys", "channels"),
    "self_attn.o_proj": ("channels", "queries"),
    "mlp.gate_proj": ("neurons", "channels"),
    "mlp.up_proj": ("neurons", "channels"),
    "mlp.down_proj": ("channels", "neurons"),
}
# Norms over a head's width, or over all heads: neither is the residual stream.
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
# What reads the residual stream, through a norm or as it is.
READERS = [name for name, axes in _OF_MODULES.items() if axes[1] == "channels"]
# What writes to it, in the order of a block.
ATTENTION_OUTPUT = "self_attn.o_proj"
MLP_OUTPUT = "mlp.down_proj"
WRITERS = [ATTENTION_OUTPUT, MLP_OUTPUT]


def parameter_axes(parts: ModelParts) -> dict[str, tuple[Axis, ...]]:
    """Return the axes of every entry of a model's state, by its name.

    Raises:
        ModelError: The model has weights that this module does not know; names the first.
    """
    around: dict[str, tuple[Axis, ...]] = dict.fromkeys((embedding_name(parts), head_name(parts)), _READER)
    return {name: _axes_of(parts, around, name, tuple(value.shape)) for name, value in parts.model.state_dict().items()}


def embedding_name(parts: ModelParts) -> str:
    """Return the name of the input embedding's module."""
    return _module_name(parts, parts.model.get_input_embeddings())


def head_name(parts: ModelParts) -> str:
    """Return the name of the output head's module."""
    return _module_name(parts, parts.model.get_output_embeddings())


def final_norm_name(parts: ModelParts) -> str:
    """Return the name of the norm behind the last block.

    Raises:
        ModelError: There is none.
    """
    if parts.final_norm is None:
        raise ModelError(
            f"{type(parts.model).__name__} has no norm behind its decoder blocks, so it is not cut in width"
        )
    return _module_name(parts, parts.final_norm)


def is_tied(parts: ModelParts) -> bool:
    """Whether the output head's matrix is the input embedding's."""
    return parts.model.get_output_embeddings().weight is parts.model.get_input_embeddings().weight


def weight_of(block: nn.Module, name: str) -> Tensor:
    """Return the weight of a block's module by its name within the block."""
    return block.get_parameter(f"{name}.weight")


def _axes_of(
    parts: ModelParts, around: Mapping[str, tuple[Axis, ...]], name: str, shape: tuple[int, ...]
) -> tuple[Axis, ...]:
    """Return the axes of one entry, given those of the modules around the blocks."""
    module, _, kind = name.rpartition(".")
    if module in around:
        return around[module][: len(shape)]
    if shape == (parts.hidden_size,) and module.rpartition(".")[0] == parts.structure.body_name:
        return ("channels",)
    prefix = f"{parts.blocks_name}."
    if module.startswith(prefix):
        _, _, within = module.removeprefix(prefix).partition(".")
        if within in _OF_MODULES and kind in ("weight", "bias"):
            return _OF_MODULES[within][: len(shape)]
        if within in HEAD_NORMS:
            return (None,) * len(shape)
        if "." not in within and shape == (parts.hidden_size,):
            return ("channels",)
    raise ModelError(
        f"{type(parts.model).__name__} cannot be cut in width: what {name} of shape {list(shape)} holds is not known; "
        "models built like Llama can (q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj): prune its layers "
        "instead"
    )


def _module_name(parts: ModelParts, wanted: object) -> str:
    return next(name for name, module in parts.model.named_modules() if module is wanted)


def mlp_size(parts: ModelParts) -> int:
    """Return the number of neurons of each block's MLP.

    Raises:
        ModelError: The blocks do not all have as many.
    """
    size = int(text_config(parts.model.config).intermediate_size)
    for index, block in enumerate(parts.blocks):
        found = weight_of(block, MLP_OUTPUT).shape[1]
        if found != size:
            raise ModelError(
                f"{type(parts.model).__name__}: block {index} has {found} neurons, its config says {size}: blocks of "
                "unequal width are not cut"
            )
    return size
