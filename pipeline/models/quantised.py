"""Checkpoints whose weights are quantised: which they are, and whether transformers can load them on this machine."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.quantizers import AutoHfQuantizer

from coldstill.pipeline.models.loading import text_config
from coldstill.pipeline.models.outlines import outline_of
from coldstill.pipeline.runtime.errors import ModelError

# A library that is missing or too old, a method that transformers does not know, or that this machine's devices do not.
_REFUSALS = (ImportError, ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError)


def quantisation_of(config: PreTrainedConfig) -> str | None:
    """Name the method that a checkpoint's weights are quantised by, such as `gptq`; None where they are not."""
    section = _section(config)
    return None if section is None else str(section.get("quant_method") or "an unnamed method")


def runs_dense(config: PreTrainedConfig, folder: Path, *, dtype: str, device: torch.device) -> bool:
    """Check that transformers can load a quantised checkpoint, and say whether its weights are dense in memory then.

    Args:
        config: Its config, which is left as it is.
        folder: Where it is.
        dtype: What it is to compute in.
        device: Where.

    Raises:
        ModelError: A library is missing, or this machine or the dtype is not one that the method runs in.
    """
    section, method = _section(config), quantisation_of(config)
    assert section is not None, "there is nothing to check of weights that are not quantised"
    try:
        quantiser = AutoHfQuantizer.from_config(copy.deepcopy(dict(section)), pre_quantized=True)
        quantiser.validate_environment(device_map={"": device})
        runs_in = quantiser.update_dtype(getattr(torch, dtype))
    except _REFUSALS as error:
        raise ModelError(
            f"{folder} has weights quantised by {method}, which transformers cannot load here: {_reason(error)}"
        ) from None
    if runs_in != getattr(torch, dtype):
        name = str(runs_in).removeprefix("torch.")
        raise ModelError(
            f"{folder} has weights quantised by {method}, which run in {name} here, not in {dtype}: set "
            f"teacher.dtype={name}"
        )
    # compressed-tensors opens them at the first forward pass, unless it has kernels of its own for them.
    opens_them = method == "compressed-tensors" and not getattr(quantiser, "use_fp8_kernel", False)
    return opens_them or bool(getattr(quantiser.quantization_config, "dequantize", False))


def bytes_when_dense(config: PreTrainedConfig, *, dtype: str, trust_remote_code: bool) -> int:
    """Return what a model's weights take in memory where all of them are in one dtype."""
    outline = outline_of(config, trust_remote_code=trust_remote_code)
    return sum(weight.numel() for weight in outline.parameters()) * int(getattr(torch, dtype).itemsize)


def _section(config: PreTrainedConfig) -> Mapping[str, Any] | None:
    for of in (config, text_config(config)):
        section = getattr(of, "quantization_config", None)
        if section is not None:
            found: Mapping[str, Any] = section if isinstance(section, Mapping) else section.to_dict()
            return found
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0].replace("_", "-")
        return f"the package {package} is missing; run: pip install {package}"
    return " ".join(str(error).split()) or type(error).__name__
