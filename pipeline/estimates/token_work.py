"""What one token costs a model, counted off its modules without their weights: products, and memory at work.

The arithmetic stands in docs/plan.md.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from coldstill.pipeline.models import find_structure, text_config
from coldstill.pipeline.models.sizes import ModelSizes

# Of the stream, and of what is widest inside a block, so many copies exist at once: embeddings, the stream in front of
# the block and behind its attention, and its norm; of an MLP, the gate, what it gates, and their product.
_COPIES_OF_STREAM, _COPIES_OF_WIDEST = 4, 3


@dataclass(frozen=True)
class TokenWork:
    """What one token costs a model's forward pass.

    Attributes:
        block_flops: Floating-point operations of all decoder blocks, two for each multiplication and addition.
        head_flops: Those of the output head.
        num_values: How many numbers it holds inside a block at most, beside what is the same for all tokens.
    """

    block_flops: float
    head_flops: float
    num_values: float

    @classmethod
    def of(cls, outline: PreTrainedModel, *, length: int) -> "TokenWork":
        """Count it.

        Args:
            outline: The model; its weights may be on torch's meta device.
            length: Tokens of a row, all of which attention multiplies with each.
        """
        config = text_config(outline.config)
        sizes = ModelSizes.of(config)
        blocks = outline.get_submodule(find_structure(outline).blocks_name)
        assert isinstance(blocks, nn.ModuleList)
        shares = {name: _share_at_work(weight, config) for name, weight in blocks.named_parameters()}
        weights = dict(blocks.named_parameters())
        products = sum(shares[name] * weight.numel() for name, weight in weights.items() if weight.dim() > 1)
        # Scores, and values by scores: each head multiplies its width with every token of the row, twice.
        attention = 2 * len(blocks) * config.num_attention_heads * _head_dim(config) * length
        widest = max(
            max(weight.shape[-2:]) * max(1.0, shares[name] * weight.shape[0] if weight.dim() == 3 else 1.0)
            for name, weight in weights.items()
            if weight.dim() > 1
        )
        return cls(
            block_flops=2.0 * (products + attention),
            head_flops=2.0 * sizes.width * sizes.vocab_size,
            num_values=_COPIES_OF_STREAM * sizes.width + _COPIES_OF_WIDEST * widest,
        )


def _share_at_work(weight: torch.Tensor, config: PreTrainedConfig) -> float:
    """Return the share of a weight that one token is multiplied with: all, but for a mixture's stacked experts."""
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / weight.shape[0] if weight.dim() == 3 and chosen else 1.0


def _head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
