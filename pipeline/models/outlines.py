"""A model's modules and their names without its weights, for what is to be known before a model is loaded or made."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from coldstill.pipeline.models import find_structure


def outline_of(
    config: PreTrainedConfig, *, trust_remote_code: bool = False, num_blocks: int | None = None
) -> PreTrainedModel:
    """Build a causal language model on torch's meta device, where no parameter has memory.

    Args:
        config: Its config.
        trust_remote_code: Whether the config may name code of its own.
        num_blocks: How many of its blocks to keep, the first ones; all where it is None.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    if num_blocks is not None:
        blocks = model.get_submodule(find_structure(model).blocks_name)
        assert isinstance(blocks, nn.ModuleList)
        del blocks[num_blocks:]
    return model
