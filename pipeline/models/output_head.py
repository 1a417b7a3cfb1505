"""From a model's post-norm last state to its logits, whether the weights sit in a model or in a store.

Shapes: N positions, D width, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Of a chunk's logits in float32, at most: a processor is as fast with few rows, a GPU wants many.
CHUNK_BYTES = 32 << 20
_GPU_CHUNK_BYTES = 256 << 20
_HOST = torch.device("cpu")
# Below so many rows the products with the weights wait for memory, however large the vocabulary is.
FEWEST_ROWS = 128


@dataclass(frozen=True)
class PlainLogits:
    """The head of a model that gives its logits itself.

    Attributes:
        vocab_size: V.
        device: Where the logits are.
    """

    vocab_size: int
    device: torch.device = _HOST
    weight_VD: None = None
    bias_V: None = None

    def chunks(self, num_positions: int) -> Iterator[slice]:
        """Cut positions into chunks whose float32 copies are small."""
        return _chunks(num_positions, _chunk_rows(self.vocab_size, self.device, CHUNK_BYTES))

    def detached(self, _dtype: torch.dtype | None) -> "PlainLogits":
        """Return the head itself: it has no weights."""
        return self

    def product(self, logits_NV: Tensor) -> Tensor:
        """Return the logits as they are."""
        return logits_NV

    @property
    def keeps_logits(self) -> bool:
        """Whether the logits are another's: they are the model's own."""
        return True

    def __call__(self, logits_NV: Tensor) -> Tensor:
        """Return the logits in float32."""
        return logits_NV.float()


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

    def chunks(self, num_positions: int, *, num_bytes: int | None = None) -> Iterator[slice]:
        """Cut positions into chunks whose float32 logits are small: so many bytes, 256 MiB on a GPU, or 128 rows.

        On a CPU that is 32 MiB, unless the caller asks for another size.
        """
        limit = CHUNK_BYTES if num_bytes is None else num_bytes
        return _chunks(num_positions, _chunk_rows(self.vocab_size, self.weight_VD.device, limit))

    def words(self, num_positions: int) -> "Iterator[OutputHead]":
        """Yield the head of a few words of the vocabulary after another, whose float32 logits of positions are small.

        Weights are in float32, without their gradient.
        """
        for chunk in _chunks(self.vocab_size, _chunk_rows(num_positions, self.weight_VD.device, CHUNK_BYTES)):
            bias_V = None if self.bias_V is None else self.bias_V[chunk]
            yield replace(self, weight_VD=self.weight_VD[chunk], bias_V=bias_V).detached(torch.float32)

    def detached(self, dtype: torch.dtype | None) -> "OutputHead":
        """Return the head without its weights' gradient, in a dtype; in their own where it is None."""
        dtype = dtype or self.weight_VD.dtype
        bias_V = None if self.bias_V is None else self.bias_V.detach().to(dtype)
        return replace(self, weight_VD=self.weight_VD.detach().to(dtype), bias_V=bias_V)

    def product(self, state_ND: Tensor) -> Tensor:
        """Return logits in the weights' dtype; in float32 where something comes behind the product, or of float16.

        Their gradient has their dtype, and would vanish in float16.
        """
        if self.scale != 1.0 or self.softcap is not None or self.weight_VD.dtype == torch.float16:
            return self(state_ND)
        return F.linear(state_ND.to(self.weight_VD.dtype), self.weight_VD, self.bias_V)

    @property
    def keeps_logits(self) -> bool:
        """Whether the gradient has use for the logits once they are taken."""
        return self.softcap is not None

    def before_caps(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Bring a gradient of logits, in place, to before scale and soft-cap: to the product of state and weights."""
        if self.softcap is not None:
            return gradient.mul_(self.slope(logits))
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)

    def slope(self, logits: Tensor) -> Tensor:
        """Return the derivative of each logit by the product of state and weights, from the logits themselves."""
        if self.softcap is None:
            return torch.full_like(logits, self.scale)
        return self.scale * (1.0 - (logits / self.softcap).square())

    def to(self, device: torch.device) -> "OutputHead":
        """Return the head with its weights on a device."""
        bias_V = None if self.bias_V is None else self.bias_V.to(device)
        return replace(self, weight_VD=self.weight_VD.to(device), bias_V=bias_V)

    def __call__(self, state_ND: Tensor) -> Tensor:
        """Return logits [..., V] in float32; the matrix product is in the weights' dtype, as the model does it."""
        logits = F.linear(state_ND.to(self.weight_VD.dtype), self.weight_VD, self.bias_V).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


# What makes logits of a student's last values, chunk by chunk of positions.
Head = OutputHead | PlainLogits


def _chunk_rows(row_length: int, device: torch.device, num_bytes: int) -> int:
    if device.type != "cpu":
        num_bytes = _GPU_CHUNK_BYTES
    return max(num_bytes // (4 * row_length), FEWEST_ROWS)


def _chunks(total: int, length: int) -> Iterator[slice]:
    for start in range(0, total, length):
        yield slice(start, start + length)
