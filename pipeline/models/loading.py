"""Find and load models and tokenizers, each whole: what is missing is named, never made up.

Knows transformers; knows nothing of stores, recipes or what is inside a model.
"""

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from coldstill.pipeline.models.finite import first_non_finite
from coldstill.pipeline.runtime.errors import ModelError
from coldstill.pipeline.runtime.out_of_memory import is_out_of_memory

# In a pruned student's config: the teacher block that each of its blocks was cut from.
KEPT_BLOCKS = "kept_blocks"
# And, where an earlier version narrowed its residual stream, the teacher channel that each of its channels is.
_KEPT_CHANNELS = "kept_channels"

# What transformers raises for files that are not what it expects: a RuntimeError for shapes, an ImportError for a
# library that a quantised checkpoint needs.
_LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    StrictDataclassError,
    SafetensorError,
)
# Of architectures whose body is a language model's, and whose output is none.
_OTHER_HEADS = ("Classification", "QuestionAnswering", "MultipleChoice", "MaskedLM", "RewardModel")
_NAMED = 3  # weights that an error names
# What a model is trained on, of one of many blocks: not the tables that older versions of transformers saved too.
_OF_A_BLOCK = re.compile(r"\.\d+\..*(weight|bias)$")
_CONFIG_FILES = ["config.json", "*.py"]
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]


def resolve_folder(
    path: str, *, revision: str | None = None, local_only: bool = False, config_only: bool = False
) -> Path:
    """Find a model's folder: a local one as it is, a hub name downloaded to (or found in) the hub's own cache.

    Args:
        path: The folder, or the name.
        revision: Of the hub's model.
        local_only: Whether to ask nobody for it.
        config_only: Whether its config will do, so that no weights are downloaded.

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
        wanted = _CONFIG_FILES if config_only else _HUB_FILES
        found = snapshot_download(path, revision=revision, allow_patterns=wanted, local_files_only=local_only)
    except HFValidationError:
        raise ModelError(f"no model folder at {path}") from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise ModelError(
            f"no model {path!r} (revision {revision or 'main'}), neither a folder nor on the hub"
        ) from None
    except (LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"no folder {path!r}, and the hub cannot be asked for a model of that name: {_reason(error)}"
        ) from None
    return Path(found)


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read the config of a causal language model.

    Raises:
        ModelError: The folder holds none that transformers can read, or that of another kind of model.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except _LOADING_ERRORS as error:
        raise ModelError(f"{folder} holds no model config that transformers can read: {_reason(error)}") from None
    if kind := _other_kind(config):
        raise ModelError(f"{folder} holds {kind}; Coldstill takes decoder-only language models, with their output head")
    return config


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the part of a config that describes the language model."""
    return config.get_text_config(decoder=True)


def kept_channels_of(config: PreTrainedConfig) -> list[int] | None:
    """Return the teacher's channel of each of a student's, where an earlier version wrote them; None elsewhere."""
    kept = getattr(text_config(config), _KEPT_CHANNELS, None)
    return None if kept is None else [int(channel) for channel in kept]


def kept_blocks_of(config: PreTrainedConfig) -> list[int] | None:
    """Return the teacher blocks that a student's config says it was cut from, or None."""
    kept = getattr(config, KEPT_BLOCKS, None)
    return None if kept is None else [int(block) for block in kept]


def resolve_dtype(config: PreTrainedConfig, dtype: str) -> str:
    """Turn `auto` into the dtype that the checkpoint was saved in, and return the name of a dtype."""
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
            raise ModelError(f"device {device!r} is unknown: {_reason(error)}") from None
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())


def load_model(
    folder: Path,
    *,
    dtype: str,
    trust_remote_code: bool = False,
    is_spread: bool = False,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Load a causal language model from safetensors, all of its weights, in evaluation mode.

    Args:
        folder: Where its files are.
        dtype: What it computes in.
        trust_remote_code: Whether its config may name code of its own.
        is_spread: Whether accelerate lays its blocks over all devices.
        device: Where transformers lays it otherwise; it is left on the CPU where this is None.

    Raises:
        ModelError: The folder holds no such model, or not all of its weights: transformers would make up the others. Or
            it holds blocks or parts of blocks that its config does not speak of, or numbers that are not finite.
    """
    load_config(folder, trust_remote_code=trust_remote_code)
    place = None if device is None else {"": device}
    with loading_errors(folder):
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            device_map="auto" if is_spread else place,
        )
    check_whole(folder, type(model).__name__, loaded)
    check_tie(folder, model)
    if is_spread and {"cpu", "disk"} & set(map(str, model.hf_device_map.values())):
        raise ModelError(
            f"{folder} does not fit into the memory of this machine's accelerators together: use teacher.placement "
            "streamed"
        )
    if name := first_non_finite(model.state_dict()):
        raise ModelError(non_finite(folder, name))
    return model.eval()


@contextlib.contextmanager
def loading_errors(folder: Path) -> Iterator[None]:
    """Turn what transformers raises of a folder into one line, and keep its table of what it found to itself.

    Raises:
        ModelError: transformers cannot load it.
    """
    try:
        with _without_loading_report():
            yield
    except ModelError:
        raise
    except _LOADING_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"{folder} cannot be loaded as a causal language model: {_reason(error)}") from None


def non_finite(folder: Path, name: str) -> str:
    """Say that a weight in a folder has numbers that are not finite."""
    return f"{folder} has numbers in {name} that are not finite: NaN or infinity; use another checkpoint"


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer beside a model.

    Raises:
        ModelError: There is none.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except _LOADING_ERRORS as error:
        raise ModelError(f"{folder} holds no tokenizer: {_reason(error)}") from None


def _other_kind(config: PreTrainedConfig) -> str | None:
    """Say what a config describes, where that is no causal language model; None where it is one."""
    name = (config.architectures or [type(config).__name__])[0]
    if getattr(config, "is_encoder_decoder", False):
        return f"an encoder-decoder, {name}"
    is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in (
        getattr(config, "auto_map", None) or {}
    )
    if not is_causal or name.endswith(_OTHER_HEADS):
        return f"a {name}, which is no causal language model"
    return None


@contextlib.contextmanager
def _without_loading_report() -> Iterator[None]:
    """Keep transformers from printing a table of what it found and did not find; `check_whole` says it in a line."""
    logger = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return record.funcName != "log_state_dict_report"

    # A filter, and not a level: by its logger's level transformers decides what to look at, and says more.
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def check_whole(folder: Path, name: str, loaded: Mapping[str, Any]) -> None:
    """Refuse a model of which transformers made up weights, because they were missing or had another shape.

    Args:
        folder: Where its files are.
        name: Its class.
        loaded: What transformers says of loading it.

    Raises:
        ModelError: It is such a model, or has weights of blocks that its config does not speak of.
    """
    other_shapes = [
        f"{key} ({list(there)} there, {list(wanted)} by the config)" for key, there, wanted in loaded["mismatched_keys"]
    ]
    for problem, weights in (("lacks weights", loaded["missing_keys"]), ("has weights of other shapes", other_shapes)):
        if weights:
            raise ModelError(
                f"{folder} {problem} for {name}: {_listed(weights)}; transformers would fill them with random numbers: "
                "save or download the whole model again"
            )
    unused = loaded["unexpected_keys"]
    if of_blocks := [key for key in unused if _OF_A_BLOCK.search(key)]:
        raise ModelError(
            f"{folder} has weights that {name} of its config has no place for: {_listed(of_blocks)}; they would be "
            "left out without a word: mend its config.json (num_hidden_layers, biases), or save the model again"
        )
    if unused:
        warnings.warn(f"{folder} has weights that {name} does not use: {_listed(unused)}", stacklevel=3)


def check_tie(folder: Path, model: PreTrainedModel) -> None:
    """Refuse a model whose config ties the output head to the input embedding where its file has two.

    Raises:
        ModelError: It is such a model.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    ties = getattr(text_config(model.config), "tie_word_embeddings", False)
    if ties and head is not None and hasattr(head, "weight") and head.weight is not embedding.weight:
        raise ModelError(
            f"{folder} ties output head and input embedding by its config (tie_word_embeddings), but has two different "
            "ones: set tie_word_embeddings to false in config.json if both are meant, or save the model again"
        )


def _listed(names: Collection[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(sorted(names)[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _reason(error: Exception) -> str:
    """Return an error in one line, without what transformers advises its programmers."""
    if isinstance(error, StrictDataclassError):
        return " ".join(str(error).split()).removesuffix(".")
    if isinstance(error, KeyError):
        return f"KeyError: {error}"
    text = str(error.args[0]) if error.args else str(error)
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__
