"""Losses over the vocabulary, chunk by chunk of positions: the logits of a batch never exist at once.

Forward and gradient in one pass: each chunk's logits, losses and gradients are computed and let go before the next
chunk's. What remains for the backward pass is the gradient of the last hidden state and of the output head.
Shapes: N positions that count, C positions of a chunk, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from coldstill.pipeline.models.output_head import Head, OutputHead

# Tokens whose gradient is added at once.
_PART = 4096

# The logits of a chunk of positions and which they are, to loss terms: each a sum over these positions. The logits are
# in the dtype of the head's product.
TermsOfChunk = Callable[[Tensor, slice], Tensor]


def chunked_loss(state_ND: Tensor, head: Head, terms_of_chunk: TermsOfChunk, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of some losses over the output head's logits, which carries the gradient, and each loss.

    Under autocast the products with the head's matrix are in its dtype, and all else is in float32.

    Args:
        state_ND: The student's post-norm last states, or whatever its head makes logits of.
        head: Its output head.
        terms_of_chunk: Returns, for logits [C, V] and a slice of positions, one sum for each term. It may overwrite
            the logits unless the head keeps them.
        weights: Of each term, in the weighted sum.

    Returns:
        The weighted sum, and the terms, which carry no gradient.
    """
    inputs = [state_ND, head.weight_VD, head.bias_V]
    if not torch.is_grad_enabled():
        # What a Function sees of its inputs does not say that nobody wants their gradient.
        inputs = [None if values is None else values.detach() for values in inputs]
    return _ChunkedLoss.apply(*inputs, head, terms_of_chunk, weights)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        state_ND: Tensor,
        _weight_VD: Tensor | None,
        _bias_V: Tensor | None,
        head: Head,
        terms_of_chunk: TermsOfChunk,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        device = state_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        wants_gradient = any(ctx.needs_input_grad[:3])
        gradients = _Gradients(state_ND, head, needed=ctx.needs_input_grad[:3])
        totals = torch.zeros_like(weights)
        with torch.autocast(device, enabled=False):
            own_head = head.detached(dtype)
            for chunk in head.chunks(len(state_ND)):
                logits_CV = own_head.product(state_ND[chunk]).detach().requires_grad_(wants_gradient)
                with torch.set_grad_enabled(wants_gradient):
                    terms = terms_of_chunk(logits_CV, chunk)
                    if wants_gradient:
                        (terms * weights).sum().backward()
                totals += terms.detach()
                if logits_CV.grad is not None:
                    gradients.add(chunk, own_head, logits_CV)
        ctx.gradients, ctx.dtype = gradients, state_ND.dtype
        ctx.mark_non_differentiable(totals)
        return (totals * weights).sum(), totals

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _of_terms: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradient of a chunked loss is computed with it, and can be used once")
        kept = (ctx.gradients.state_ND, ctx.gradients.weight_VD, ctx.gradients.bias_V)
        state, *of_head = (None if values is None else values.mul_(gradient) for values in kept)
        ctx.gradients = None
        return None if state is None else state.to(ctx.dtype), *of_head, None, None, None


class _Gradients:
    """What remains of the chunks: the gradients of the states and of the head's weights, each where it is needed."""

    def __init__(self, state_ND: Tensor, head: Head, *, needed: tuple[bool, bool, bool]) -> None:
        self._state_source_ND = state_ND
        # In float16 a gradient would vanish before the loss is scaled up for it.
        dtype = torch.float32 if state_ND.dtype == torch.float16 else state_ND.dtype
        # Every position belongs to a chunk, which writes its own; the others are sums.
        self.state_ND = torch.empty_like(state_ND, dtype=dtype) if needed[0] else None
        self.weight_VD = torch.zeros_like(head.weight_VD) if needed[1] and head.weight_VD is not None else None
        self.bias_V = torch.zeros_like(head.bias_V) if needed[2] and head.bias_V is not None else None

    def add(self, chunk: slice, head: Head, logits_CV: Tensor) -> None:
        """Add what a chunk's gradient, which stands at its logits, gives each of them."""
        gradient_CV = logits_CV.grad
        assert gradient_CV is not None
        if not isinstance(head, OutputHead):
            if self.state_ND is not None:
                self.state_ND[chunk] = gradient_CV
            return
        gradient_CV = head.before_caps(gradient_CV, logits_CV)
        if self.bias_V is not None:
            self.bias_V += gradient_CV.sum(dim=0)
        scale: float | Tensor = 1.0
        if head.weight_VD.dtype == torch.float16:
            # Of a mean over many positions, most would be below its range; bfloat16 and float32 have range enough.
            scale = 1.0 / gradient_CV.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
            gradient_CV = gradient_CV * scale
        product_CV = gradient_CV.to(head.weight_VD.dtype)
        if self.state_ND is not None:
            self.state_ND[chunk] = (product_CV @ head.weight_VD) / scale
        if self.weight_VD is not None:
            state_CD = self._state_source_ND[chunk].to(product_CV.dtype)
            if self.weight_VD.dtype == product_CV.dtype != torch.float16:
                self.weight_VD.addmm_(product_CV.T, state_CD)
                return
            # A part of the vocabulary at a time: what is added in float32 is still in the cache, and needs no room.
            for part in range(0, len(self.weight_VD), _PART):
                product_CP = product_CV[:, part : part + _PART]
                self.weight_VD[part : part + _PART].add_((product_CP.T @ state_CD) / scale)
