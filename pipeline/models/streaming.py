"""A causal language model whose decoder blocks stream in from its files: two of them are in memory at any time.

The rest of it, embedding, final norm and output head, is there like any other's. It runs like any model, and each pass
over its blocks reads its files once: whoever has many rows lets all of them pass one block before the next
(`coldstill.pipeline.models.passage`).
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from coldstill.pipeline.models.block_calls import why_not_alone
from coldstill.pipeline.models.block_weights import BlockWeights, put_weight
from coldstill.pipeline.models.finite import first_non_finite
from coldstill.pipeline.models.loading import check_tie, check_whole, load_config, loading_errors, non_finite
from coldstill.pipeline.models.structure import ModelParts, find_structure, take_apart
from coldstill.pipeline.models.tensor_files import StoredTensor, stored_tensors
from coldstill.pipeline.models.weight_names import WeightSource, weight_sources
from coldstill.pipeline.runtime.errors import ModelError

_PROBE_TOKENS = 8


def load_streamed(folder: Path, *, dtype: str, device: torch.device, trust_remote_code: bool = False) -> ModelParts:
    """Load a causal language model from safetensors, but for its blocks, which it reads when they are called.

    Every number that it gives is the one that the model gives when it is loaded whole.

    Args:
        folder: Where its files are; they stay there as long as it is used.
        dtype: What it computes in.
        device: Where it computes, and where the blocks at work lie.
        trust_remote_code: Whether its config may name code of its own.

    Raises:
        ModelError: The folder holds no such model, or not all of its weights, or its blocks cannot be run one by one.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code)
    stored = stored_tensors(folder)
    with loading_errors(folder):
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
            )
        dtypes = _checked_dtypes(folder, model, config, stored, getattr(torch, dtype))
        reader = _Reader(folder, model, stored, dtypes, device)
    blocks_name = find_structure(model).blocks_name
    blocks = model.get_submodule(blocks_name)
    assert isinstance(blocks, nn.ModuleList)
    of_block: list[list[WeightSource]] = [[] for _ in blocks]
    others: list[WeightSource] = []
    for source in weight_sources(model, stored):
        index = source.target.removeprefix(f"{blocks_name}.").partition(".")[0]
        is_of_block = source.target.startswith(f"{blocks_name}.")
        (of_block[int(index)] if is_of_block else others).append(source)
    _load_others(folder, model, reader.read(others), device)
    prefixes = [f"{blocks_name}.{index}." for index in range(len(blocks))]
    loader = BlockWeights(
        blocks,
        lambda index: {
            name.removeprefix(prefixes[index]): value for name, value in reader.read(of_block[index]).items()
        },
    )
    parts = dataclasses.replace(take_apart(model.eval()), loader=loader)
    if problem := why_not_alone(parts, torch.arange(_PROBE_TOKENS) % parts.vocab_size):
        raise ModelError(
            f"{type(model).__name__} cannot be streamed, block by block: {problem}; use teacher.placement whole or "
            "spread"
        )
    return parts


class _Reader:
    """Reads weights of a model onto its device.

    Args:
        folder: Where its files are.
        model: The model.
        stored: Its tensors by name.
        dtypes: Of its weights, by name.
        device: Where they are to lie.
    """

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel,
        stored: Mapping[str, StoredTensor],
        dtypes: Mapping[str, torch.dtype],
        device: torch.device,
    ) -> None:
        self._folder = folder
        self._model = model
        self._stored = stored
        self._dtypes = dtypes
        self._device = device
        self._checked: set[str] = set()
        # Copies on a stream of their own do not wait for what a block at work computes.
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def read(self, sources: Sequence[WeightSource]) -> dict[str, Tensor]:
        """Return the weights that some sources make, by name; when they are read first, they are looked through.

        Raises:
            ModelError: One is not finite, or a file has changed.
        """
        with torch.cuda.stream(self._copies):  # nothing where there is none
            weights: dict[str, Tensor] = {}
            for source in sources:
                weights |= source.make(functools.partial(self._tensor, target=source.target), self._model)
            new = {name: value for name, value in weights.items() if name not in self._checked}
            if name := first_non_finite(new):
                raise ModelError(non_finite(self._folder, name))
            self._checked |= new.keys()
        if self._copies is not None:
            self._copies.synchronize()
        return weights

    def _tensor(self, name: str, target: str) -> Tensor:
        value = self._stored[name].read(is_pinned=self._copies is not None)
        return value.to(self._device, non_blocking=True).to(self._dtypes[target])


def _checked_dtypes(
    folder: Path,
    model: PreTrainedModel,
    config: PreTrainedConfig,
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype,
) -> dict[str, torch.dtype]:
    """Let transformers load tensors without numbers, and return the dtype that it gives each weight.

    Raises:
        ModelError: Weights are missing, of other shapes, or there are more of them than the config speaks of.
    """
    with torch.device("meta"):
        without_numbers = {name: torch.empty(one.shape, dtype=one.torch_dtype) for name, one in stored.items()}
    loaded, facts = type(model).from_pretrained(
        None,
        config=config,
        state_dict=without_numbers,
        device_map={"": "meta"},
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    check_whole(folder, type(model).__name__, facts)
    return {name: value.dtype for name, value in loaded.state_dict().items()}


def _load_others(folder: Path, model: PreTrainedModel, weights: Mapping[str, Tensor], device: torch.device) -> None:
    """Give a model all weights but those of its blocks, and bring to the device what is in no file."""
    for name, buffer in list(model.named_buffers()):
        if not buffer.is_meta:
            put_weight(model, name, buffer.to(device))
    for name, value in weights.items():
        put_weight(model, name, value)
    missing = set(model.all_tied_weights_keys) | set(model.all_tied_weights_keys.values())
    model.tie_weights(missing_keys=missing - weights.keys(), recompute_mapping=False)
    check_tie(folder, model)
