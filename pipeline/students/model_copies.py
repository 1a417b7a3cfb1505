"""A model of a changed config that takes its weights from another: what every way of cutting ends in.

Knows transformers' configs; knows nothing of which weights go.
"""

import copy
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, PreTrainedModel

from coldstill.pipeline.models import text_config
from coldstill.pipeline.runtime.errors import ModelError


def changed_config(config: PreTrainedConfig, **changes: Any) -> PreTrainedConfig:
    """Copy a config with other values for some keys of its language model.

    Llama's config allows only widths that the number of attention heads divides, although its heads have a width of
    their own. Mistral's is the same architecture without that rule, so a Llama of another width becomes a Mistral; the
    two compute the same numbers.

    Raises:
        ModelError: The architecture does not allow the values.
    """
    changed = copy.deepcopy(config)
    of_text = text_config(changed)
    for key, value in changes.items():
        setattr(of_text, key, value)
    if not hasattr(of_text, "validate"):  # code of a model's own, from before transformers checked configs
        return changed
    try:
        of_text.validate()
    except StrictDataclassError as error:
        if isinstance(changed, LlamaConfig) and not (changed.attention_bias or changed.mlp_bias):
            return _as_mistral(changed)
        raise ModelError(f"{type(config).__name__} does not allow {_values(changes)}: {_last_line(error)}") from None
    return changed


def reread_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a config as transformers will read it from its file; the kind of attention stays.

    Raises:
        ModelError: transformers would not read it.
    """
    try:
        reread = type(config).from_dict(copy.deepcopy(config.to_dict()))
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{type(config).__name__} does not allow this cut: {_last_line(error)}") from None
    reread._attn_implementation = config._attn_implementation
    return reread


def model_from_state(
    config: PreTrainedConfig, state: Mapping[str, Tensor], *, like: PreTrainedModel
) -> PreTrainedModel:
    """Make a model of a config from weights by name, with the dtype, device and generation config of another.

    Weights that the config ties are taken from the input embedding.
    """
    model = empty_model(config, like=like)
    load_state(model, state)
    return model


def empty_model(config: PreTrainedConfig, *, like: PreTrainedModel) -> PreTrainedModel:
    """Make a model of a config with weights of no meaning, and the dtype, device and generation config of another."""
    model = AutoModelForCausalLM.from_config(config, dtype=like.dtype)
    model.generation_config = copy.deepcopy(like.generation_config)
    return model.to(like.device).eval()


def load_state(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Load weights by name, each in its dtype: of a model in half precision, transformers keeps some in float32."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if name in state:
            value.data = value.data.to(state[name].dtype)
    model.load_state_dict(state)


def _as_mistral(config: LlamaConfig) -> MistralConfig:
    fields = set(MistralConfig().to_dict()) - {"architectures", "model_type", "sliding_window", "transformers_version"}
    values = config.to_dict()
    ours = {key: value for key, value in values.items() if key in fields or key.startswith("kept_")}
    return MistralConfig(**ours, sliding_window=None, architectures=["MistralForCausalLM"])


def _values(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in changes.items() if isinstance(value, int))


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()
