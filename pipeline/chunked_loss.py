"""Losses over the vocabulary, chunk by chunk of positions: the logits of a batch never exist at once.

Forward and gradient in one pass: each chunk's logits, losses and gradients are computed and let go before the next
chunk's. What remains for the backward pass is the gradient of the last hidden state and of the output head.
Shapes: N positions that count, C positions of a chunk, D width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.output_head import OutputHead

# The logits of a chunk of positions and which they are, to loss terms: each a sum over these positions.
TermsOfChunk = Callable[[Tensor, slice], Tensor]


def chunked_loss(
    state_ND: Tensor, head: OutputHead, terms_of_chunk: TermsOfChunk, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Give the weighted sum of some losses over the output head's logits, which carries the gradient, and each loss.

    Args:
        state_ND: The student's post-norm last states.
        head: Its output head.
        terms_of_chunk: Gives, for logits [C, V] in float32 and a slice of positions, one sum for each term.
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
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: OutputHead,
        terms_of_chunk: TermsOfChunk,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[:3]
        weight, bias = (_leaf(values, needed) for values, needed in ((weight_VD, wanted[1]), (bias_V, wanted[2])))
        assert weight is not None
        own_head = replace(head, weight_VD=weight, bias_V=bias)
        state_gradient_ND = torch.zeros_like(state_ND) if wanted[0] else None
        totals = torch.zeros_like(weights)
        for chunk in head.chunks(len(state_ND)):
            chunk_CD = state_ND[chunk].detach().requires_grad_(wanted[0])
            with torch.set_grad_enabled(any(wanted)):
                terms = terms_of_chunk(own_head(chunk_CD), chunk)
                if any(wanted):
                    (terms * weights).sum().backward()
            totals += terms.detach()
            if state_gradient_ND is not None:
                assert chunk_CD.grad is not None
                state_gradient_ND[chunk] = chunk_CD.grad
        ctx.gradients = [state_gradient_ND, weight.grad, None if bias is None else bias.grad]
        ctx.mark_non_differentiable(totals)
        return (totals * weights).sum(), totals

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _of_terms: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if values is None else values.mul_(gradient) for values in ctx.gradients]
        ctx.gradients = [None] * len(scaled)
        return (*scaled, None, None, None)


def _leaf(values: Tensor | None, needs_gradient: bool) -> Tensor | None:
    return None if values is None else values.detach().requires_grad_(needs_gradient)
