"""From a model's post-norm last state to its logits, whether the weights sit in a model or in a store.

Shapes: N positions, D width, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class OutputHead:
    """A linear map to the vocabulary, then a scale, then a soft-cap.

    Attributes:
        weight_VD: The unembedding matrix, in the model's dtype.
        bias_V: Its bias, where it has one.
        scale: What the logits are multiplied by (Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`).
        softcap: c in `c * tanh(logits / c)` (Gemma 2's `final_logit_softcapping`); none where it is None.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return self.weight_VD.shape[0]

    @classmethod
    def of_model(cls, head: Any, config: Any) -> "OutputHead":
        """Take the head of a model, given its output embedding and its config; the weights are shared, not copied."""
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        return cls(
            weight_VD=head.weight,
            bias_V=getattr(head, "bias", None),
            scale=scale,
            softcap=getattr(config, "final_logit_softcapping", None),
        )

    def chunks(self, num_positions: int) -> Iterator[slice]:
        """Cut positions into chunks whose float32 logits take 64 MiB at most."""
        length = max(_CHUNK_BYTES // (4 * self.vocab_size), 1)
        for start in range(0, num_positions, length):
            yield slice(start, start + length)

    def slope(self, logits: Tensor) -> Tensor:
        """Give the derivative of each logit by the product of state and weights, from the logits themselves."""
        if self.softcap is None:
            return torch.full_like(logits, self.scale)
        return self.scale * (1.0 - (logits / self.softcap).square())

    def to(self, device: torch.device) -> "OutputHead":
        """Give the head with its weights on a device."""
        bias_V = None if self.bias_V is None else self.bias_V.to(device)
        return replace(self, weight_VD=self.weight_VD.to(device), bias_V=bias_V)

    def __call__(self, state_ND: Tensor) -> Tensor:
        """Give logits [..., V] in float32; the matrix product is in the weights' dtype, as the model does it."""
        logits = F.linear(state_ND.to(self.weight_VD.dtype), self.weight_VD, self.bias_V).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits
