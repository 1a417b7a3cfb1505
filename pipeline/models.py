"""Load models and tokenizers; find decoder blocks, final norm and output head by structure.

Knows transformers; knows nothing of stores or recipes. No list of architectures: a causal language model is a list of
equal blocks as long as its config says, a norm behind them, and an output embedding.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from cache.errors import ModelError
from cache.identity import teacher_identity, weights_digest
from pipeline.output_head import OutputHead

# In a pruned student's config: the teacher block that each of its blocks was cut from.
KEPT_BLOCKS = "kept_blocks"
# And, of one whose residual stream was narrowed, the teacher channel that each of its channels is.
KEPT_CHANNELS = "kept_channels"

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
_PROBE_TOKENS = 8


@dataclass(frozen=True)
class Structure:
    """Where a causal language model keeps its decoder blocks.

    Attributes:
        blocks_name: The name of the block list within the model, such as `model.layers`.
    """

    blocks_name: str

    @property
    def body_name(self) -> str:
        """The name of the model without its output head, such as `model`; empty where it is the model itself."""
        return self.blocks_name.rpartition(".")[0]


@dataclass(frozen=True)
class ModelParts:
    """A causal language model taken apart; every part still belongs to the model.

    Attributes:
        model: The whole.
        body: The model without its output head: token ids to last hidden state.
        blocks: Its decoder blocks; block i of n, 0-based, is what index i means everywhere in Coldstill.
        blocks_name: The name of the block list within the model, such as `model.layers`.
        final_norm: The norm behind the last block.
        output_head: Post-norm state to logits.
    """

    model: PreTrainedModel
    body: nn.Module
    blocks: nn.ModuleList
    blocks_name: str
    final_norm: nn.Module
    output_head: OutputHead

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(text_config(self.model.config).hidden_size)

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        config = text_config(self.model.config)
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return self.output_head.vocab_size


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


def find_structure(model: PreTrainedModel) -> Structure:
    """Find a model's list of decoder blocks, as long as its config says, and the body that holds it.

    Raises:
        ModelError: There is no such list, or no output embedding.
    """
    name = type(model).__name__
    num_blocks = text_config(model.config).num_hidden_layers
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    matching = [path for path, module in lists if len(module) == num_blocks]
    if not matching:
        raise ModelError(f"{name} has no list of {num_blocks} decoder blocks, the number that its config gives")
    if model.get_output_embeddings() is None:
        raise ModelError(f"{name} has no output embedding: it is no causal language model")
    return Structure(min(matching, key=lambda path: path.count(".")))


def take_apart(model: PreTrainedModel) -> ModelParts:
    """Find a model's parts by structure, and check that they make up the model.

    Raises:
        ModelError: A part cannot be found, or head over body does not give the model's own logits.
    """
    parts = find_parts(model)
    problem = head_problem(model, Structure(parts.blocks_name))
    if problem is not None:
        raise ModelError(problem)
    return parts


def find_parts(model: PreTrainedModel) -> ModelParts:
    """Find a model's parts by structure alone, which may be without weights.

    Raises:
        ModelError: A part cannot be found.
    """
    structure = find_structure(model)
    body, blocks = model.get_submodule(structure.body_name), model.get_submodule(structure.blocks_name)
    assert isinstance(blocks, nn.ModuleList)
    return ModelParts(
        model=model,
        body=body,
        blocks=blocks,
        blocks_name=structure.blocks_name,
        final_norm=_find_final_norm(body, blocks, type(model).__name__),
        output_head=OutputHead.of_model(model.get_output_embeddings(), text_config(model.config)),
    )


@torch.no_grad()
def head_problem(model: PreTrainedModel, structure: Structure) -> str | None:
    """Say what keeps a model's logits from being its output head over its body's last state; None where they are.

    Runs both over a few tokens, so that an unknown scaling or soft-cap cannot slip by.
    """
    name, head = type(model).__name__, model.get_output_embeddings()
    if type(head).forward is not nn.Linear.forward:
        # Adapters begin at zero and would slip by.
        return f"{name}: its output head is a {type(head).__name__}, which Coldstill does not take apart"
    device = next(model.parameters()).device
    ids = torch.arange(_PROBE_TOKENS, device=device).remainder(head.weight.shape[0]).unsqueeze(0)
    expected = model(input_ids=ids, use_cache=False).logits.float()
    state = model.get_submodule(structure.body_name)(input_ids=ids, use_cache=False).last_hidden_state
    got = OutputHead.of_model(head, text_config(model.config))(state)
    tolerance = 32 * torch.finfo(next(model.parameters()).dtype).eps * expected.abs().max().clamp(min=1.0)
    error = (got - expected).abs().max()
    # A teacher that gives NaN here gives it everywhere; the capture says where it begins.
    if bool(torch.isfinite(expected).all()) and not error <= tolerance:
        return (
            f"{name}: output head over last hidden state differs from the model's logits by {error:.3g} (at most "
            f"{tolerance:.3g} expected): its head does something that Coldstill does not know"
        )
    return None


def identify(folder: Path, config: PreTrainedConfig, *, dtype: str) -> dict[str, str]:
    """Say which model a folder holds, by content: its config, its weights and the dtype that it is to run in."""
    return teacher_identity(config=config.to_dict(), weights=weights_digest(folder), dtype=dtype)


def check_vocabularies(teacher: PreTrainedConfig | int, student: PreTrainedConfig) -> None:
    """Refuse a student whose logits are not over the teacher's vocabulary.

    Raises:
        ModelError: The numbers of entries differ.
    """
    teacher_size = teacher if isinstance(teacher, int) else text_config(teacher).vocab_size
    student_size = text_config(student).vocab_size
    if teacher_size != student_size:
        raise ModelError(
            f"teacher and student have different vocabularies: {teacher_size} entries against {student_size}; "
            "distillation of logits needs one vocabulary: use a student of the teacher's family and padding"
        )


def check_tokenizers(teacher_folder: Path, student_folder: Path) -> None:
    """Refuse a student whose tokenizer gives tokens other numbers than the teacher's; absent ones are not compared.

    Raises:
        ModelError: The two vocabularies assign different ids.
    """
    vocabularies = [_vocabulary(folder) for folder in (teacher_folder, student_folder)]
    if None not in vocabularies and vocabularies[0] != vocabularies[1]:
        raise ModelError(
            f"teacher and student have different vocabularies: the tokenizers in {teacher_folder} and {student_folder} "
            "give tokens different ids"
        )


def _vocabulary(folder: Path) -> Any:
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    return json.loads(file.read_text(encoding="utf-8")).get("model", {}).get("vocab")


def _find_final_norm(body: nn.Module, blocks: nn.ModuleList, name: str) -> nn.Module:
    children = list(body.children())
    behind = children[children.index(blocks) + 1 :]
    norms = [child for child in behind if _is_norm(child)]
    if not norms:
        raise ModelError(f"{name} has no norm behind its decoder blocks")
    return norms[-1]


def _is_norm(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    if not parameters:
        return "norm" in type(module).__name__.lower()  # OLMo's norm has no parameters
    return all(parameter.dim() == 1 for parameter in parameters)


def _first_line(error: Exception) -> str:
    text = str(error.args[0]) if error.args else str(error)
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__
