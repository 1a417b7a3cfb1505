"""Find and load models and tokenizers, each whole: what is missing is named, never made up.

Knows transformers; knows nothing of stores, recipes or what is inside a model.
"""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from cache.errors import ModelError
from cache.identity import teacher_identity, weights_digest

# In a pruned student's config: the teacher block that each of its blocks was cut from.
KEPT_BLOCKS = "kept_blocks"
# And, of one whose residual stream was narrowed, the teacher channel that each of its channels is.
KEPT_CHANNELS = "kept_channels"

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]


def resolve_folder(path: str, *, revision: str | None = None, local_only: bool = False) -> Path:
    """Find a model's folder: a local one as it is, a hub name downloaded to (or found in) the hub's own cache.

    Raises:
        ModelError: There is no such folder, and no such model on the hub or the hub cannot be reached.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        found = snapshot_download(path, revision=revision, allow_patterns=_HUB_FILES, local_files_only=local_only)
    except HFValidationError:
        raise ModelError(f"no model folder at {path}") from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise ModelError(
            f"no model {path!r} (revision {revision or 'main'}), neither a folder nor on the hub"
        ) from None
    except (LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"no folder {path!r}, and the hub cannot be asked for a model of that name: {_first_line(error)}"
        ) from None
    return Path(found)


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read a model's config.

    Raises:
        ModelError: The folder holds none that transformers can read.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} holds no model config that transformers can read: {_first_line(error)}") from None


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Give the part of a config that describes the language model."""
    return config.get_text_config(decoder=True)


def kept_channels_of(config: PreTrainedConfig) -> list[int] | None:
    """Give the teacher's channel of each of a student's, or None where the student's stream was not cut from it."""
    kept = getattr(text_config(config), KEPT_CHANNELS, None)
    return None if kept is None else [int(channel) for channel in kept]


def kept_blocks_of(config: PreTrainedConfig) -> list[int] | None:
    """Give the teacher blocks that a student's config says it was cut from, or None."""
    kept = getattr(config, KEPT_BLOCKS, None)
    return None if kept is None else [int(block) for block in kept]


def resolve_dtype(config: PreTrainedConfig, dtype: str) -> str:
    """Turn `auto` into the dtype that the checkpoint was saved in, and give the name of a dtype."""
    if dtype != "auto":
        return dtype
    saved = getattr(text_config(config), "dtype", None) or getattr(config, "dtype", None) or torch.float32
    return str(saved).removeprefix("torch.")


def resolve_device(device: str) -> torch.device:
    """Turn `auto` into this process's accelerator, the first one unless torchrun said another, or into the CPU."""
    if device != "auto":
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise ModelError(f"device {device!r} is unknown: {_first_line(error)}") from None
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())


def load_model(folder: Path, *, dtype: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a causal language model from safetensors, on the CPU, in evaluation mode.

    Raises:
        ModelError: The folder holds no such model.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} holds no causal language model in safetensors: {_first_line(error)}") from None
    return model.eval()


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer beside a model.

    Raises:
        ModelError: There is none.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} holds no tokenizer: {_first_line(error)}") from None


def identify(folder: Path, config: PreTrainedConfig, *, dtype: str) -> dict[str, str]:
    """Say which model a folder holds, by content: its config, its weights and the dtype that it is to run in."""
    return teacher_identity(config=config.to_dict(), weights=weights_digest(folder), dtype=dtype)


def _first_line(error: Exception) -> str:
    text = str(error.args[0]) if error.args else str(error)
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__
