"""Find decoder blocks and output head by structure, and check that they make up the model.

No list of architectures: a causal language model is a list of equal blocks as long as its config says, and an output
embedding.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from cache.errors import ModelError
from pipeline.models.loading import text_config
from pipeline.output_head import OutputHead

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
