"""Find decoder blocks and output head by structure, and check that they make up a causal language model.

No list of architectures: a causal language model is a list of equal blocks as long as its config says, and an output
embedding, and no position of it sees a later one.
"""

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coldstill.pipeline.models.loading import text_config
from coldstill.pipeline.models.output_head import OutputHead
from coldstill.pipeline.runtime.errors import ModelError

_PROBE_TOKENS = 8


@dataclass(frozen=True)
class Structure:
    """Where a causal language model keeps its decoder blocks.

    Attributes:
        blocks_name: The name of the block list within the model, such as `model.layers`.
        body_name: The name of the model without its output head, such as `model`.
    """

    blocks_name: str
    body_name: str


class BlockLoader(Protocol):
    """What brings a block its weights, where not all of a model's blocks have theirs at once.

    Attributes:
        waited_s: How long blocks have waited for their weights so far.
    """

    waited_s: float

    def bring(self, index: int) -> None:
        """Let a block have its weights; those of the block that had them go. A block that is called has them anyway."""

    def drop(self) -> None:
        """Let the block that has its weights be without them, while what is read for the next one stays."""

    def rest(self) -> None:
        """Let no block have its weights until one is called."""


@dataclass(frozen=True)
class ModelParts:
    """A causal language model taken apart; every part still belongs to the model.

    Attributes:
        model: The whole.
        body: The model without its output head: token ids to last hidden state.
        blocks: Its decoder blocks; block i of n, 0-based, is what index i means everywhere in Coldstill.
        structure: The names of blocks and body within the model.
        output_head: Post-norm state to logits.
        loader: What brings the blocks their weights one by one; None where all have them.
    """

    model: PreTrainedModel
    body: nn.Module
    blocks: nn.ModuleList
    structure: Structure
    output_head: OutputHead
    loader: BlockLoader | None = None

    @cached_property
    def final_norm(self) -> nn.Module | None:
        """The norm that runs behind the last block; None where none does. Found by running a few tokens, once."""
        return _find_final_norm(self)

    def bring(self, index: int) -> None:
        """Let a block have its weights, before they are read otherwise than by calling it."""
        if self.loader is not None:
            self.loader.bring(index)

    def rest(self) -> None:
        """Let the blocks' memory go until one is called, where blocks get their weights then anyway."""
        if self.loader is not None:
            self.loader.rest()

    @property
    def blocks_name(self) -> str:
        """The name of the block list within the model, such as `model.layers`."""
        return self.structure.blocks_name

    @property
    def device(self) -> torch.device:
        """Where its last states and logits are."""
        return self.output_head.weight_VD.device

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
    blocks_name = min(matching, key=lambda path: path.count("."))
    return Structure(blocks_name, _body_around(model, blocks_name))


def take_apart(model: PreTrainedModel) -> ModelParts:
    """Find a model's parts by structure, and check that they make up the model.

    Raises:
        ModelError: A part cannot be found, head over body does not give the model's own logits, or a position sees a
            later one.
    """
    find_structure(model)
    # Before it is looked into: a head of another kind need not have a matrix.
    if problem := _foreign_head(model):
        raise ModelError(problem)
    parts = find_parts(model)
    logits = _probe_logits(model, _probe_tokens(model))
    if problem := _head_problem(model, parts.structure, logits) or _causality_problem(model, logits):
        raise ModelError(problem)
    return parts


def find_parts(model: PreTrainedModel) -> ModelParts:
    """Find a model's parts by structure alone. It may be without weights, unless its final norm is asked for.

    Raises:
        ModelError: A part cannot be found.
    """
    structure = find_structure(model)
    body, blocks = model.get_submodule(structure.body_name), model.get_submodule(structure.blocks_name)
    assert isinstance(blocks, nn.ModuleList)
    parts = ModelParts(
        model=model,
        body=body,
        blocks=blocks,
        structure=structure,
        output_head=OutputHead.of_model(model.get_output_embeddings(), text_config(model.config)),
    )
    head_width = parts.output_head.weight_VD.shape[1]
    if head_width != parts.hidden_size:
        raise ModelError(
            f"{type(model).__name__}: its output head reads states of width {head_width}, its blocks write "
            f"{parts.hidden_size}: what stands between them is not known to Coldstill"
        )
    return parts


def _body_around(model: PreTrainedModel, blocks_name: str) -> str:
    """Name the innermost module around the blocks that takes token ids."""
    name = blocks_name
    while name:
        name = name.rpartition(".")[0]
        if "input_ids" in inspect.signature(model.get_submodule(name).forward).parameters:
            break
    return name


def head_problem(model: PreTrainedModel, structure: Structure) -> str | None:
    """Say what keeps a model's logits from being its output head over its body's last state; None where they are.

    Runs both over a few tokens, so that an unknown scaling or soft-cap cannot slip by.
    """
    return _foreign_head(model) or _head_problem(model, structure, _probe_logits(model, _probe_tokens(model)))


def _foreign_head(model: PreTrainedModel) -> str | None:
    """Say that an output head is no linear map by its class; None where it is one."""
    head = model.get_output_embeddings()
    if type(head).forward is nn.Linear.forward:
        return None
    # Found by its class, since adapters begin at zero and would pass for nothing when the model is run.
    return f"{type(model).__name__}: its output head is a {type(head).__name__}, which Coldstill does not take apart"


@torch.no_grad()
def _head_problem(model: PreTrainedModel, structure: Structure, expected: Tensor) -> str | None:
    """Hold the output head over the body's last state against the model's own logits of the probe [1, T, V]."""
    body = model.get_submodule(structure.body_name)
    state = body(input_ids=_probe_tokens(model), use_cache=False).last_hidden_state
    got = OutputHead.of_model(model.get_output_embeddings(), text_config(model.config))(state)
    tolerance = _tolerance(model, expected)
    error = (got.to(expected.device) - expected).abs().max()
    # A teacher that gives NaN here gives it everywhere; the capture says where it begins.
    if bool(torch.isfinite(expected).all()) and not error <= tolerance:
        return (
            f"{type(model).__name__}: output head over last hidden state differs from the model's logits by "
            f"{error:.3g} (at most {tolerance:.3g} expected): its head does something that Coldstill does not know"
        )
    return None


@torch.no_grad()
def _causality_problem(model: PreTrainedModel, logits: Tensor) -> str | None:
    """Say that a position sees a later one, as in an encoder; None where none does.

    Args:
        model: The model.
        logits: Its logits of the probe tokens [1, T, V].
    """
    others = _probe_tokens(model)
    others[0, -1] = (others[0, -1] + 1) % model.get_output_embeddings().weight.shape[0]
    before, after = logits[0, :-1], _probe_logits(model, others)[0, :-1]
    error, tolerance = (after - before).abs().max(), _tolerance(model, before)
    if bool(torch.isfinite(before).all()) and not error <= tolerance:
        return (
            f"{type(model).__name__}: another last token changes the logits before it by {error:.3g} (at most "
            f"{tolerance:.3g} expected): its positions see later ones, so it is no causal language model"
        )
    return None


@torch.no_grad()
def _find_final_norm(parts: ModelParts) -> nn.Module | None:
    """Find the norm behind the blocks by what runs after the last of them; where it stands says nothing."""
    ran: list[nn.Module] = []

    def note(module: nn.Module, _args: Any, _output: Any) -> None:
        ran.append(module)

    children = [child for child in parts.body.children() if _is_norm(child)]
    handles = [child.register_forward_hook(note) for child in children]
    handles.append(parts.blocks[-1].register_forward_hook(lambda *_: ran.clear()))
    try:
        parts.body(input_ids=_probe_tokens(parts.model), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return ran[-1] if ran else None


def _probe_tokens(model: PreTrainedModel) -> Tensor:
    """Return a row of a few token ids [1, T]."""
    device = next(model.parameters()).device
    return torch.arange(_PROBE_TOKENS, device=device).remainder(text_config(model.config).vocab_size).unsqueeze(0)


@torch.no_grad()
def _probe_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Run a model over token ids [1, T], and return its logits in float32."""
    return model(input_ids=ids, use_cache=False).logits.float()


def _tolerance(model: PreTrainedModel, logits: Tensor) -> float:
    """Return how far the same logits lie apart at most where they are computed in two ways."""
    return float(32 * torch.finfo(next(model.parameters()).dtype).eps * logits.abs().max().clamp(min=1.0))


def _is_norm(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    if not parameters:
        return "norm" in type(module).__name__.lower()  # OLMo's norm has no parameters
    return all(parameter.dim() == 1 for parameter in parameters)
