"""Draws from what lies beyond the likeliest tokens, each with the importance weight that makes sums over them unbiased.

Random sampling knowledge distillation (arXiv 2503.16870) draws from the whole distribution; here the likeliest tokens
are stored exactly and only the tail is drawn, from the mean of its distributions at several temperatures, so that one
set of draws serves them all. The draws of a position are systematic: one uniform number moves a comb of equal steps
over the cumulative distribution, which makes every token's expected count what independent draws would give, with
less variance.
Shapes: C positions of a chunk, K likeliest tokens, M draws, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def draw_tail(
    logits_CV: Tensor, top_ids_CK: Tensor, *, temperatures: Sequence[float], num_draws: int, uniforms_C: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw tokens beyond the K likeliest: their logits, ids (ascending) and log-weights, each [C, M].

    Args:
        logits_CV: The teacher's logits, float32.
        top_ids_CK: The K likeliest tokens, which are not drawn; K < V.
        temperatures: The proposal is the mean of the tail's distributions at these.
        num_draws: M.
        uniforms_C: One number in [0, 1) for each position, which decides its draws.
    """
    tail_CV = logits_CV.scatter(-1, top_ids_CK, -torch.inf)
    proposal_CV = torch.zeros_like(logits_CV, dtype=torch.float64)
    for temperature in temperatures:
        proposal_CV += (tail_CV / temperature).softmax(dim=-1)
    proposal_CV /= proposal_CV.sum(dim=-1, keepdim=True)
    cumulative_CV = proposal_CV.cumsum(dim=-1)
    comb_M = torch.arange(num_draws, device=logits_CV.device, dtype=torch.float64)
    teeth_CM = (comb_M + uniforms_C.double().unsqueeze(-1)) / num_draws * cumulative_CV[:, -1:]
    # The first token whose cumulative probability is beyond the tooth: never one of probability zero.
    ids_CM = torch.searchsorted(cumulative_CV, teeth_CM, right=True).clamp(max=logits_CV.shape[-1] - 1)
    log_weights_CM = -(num_draws * proposal_CV.gather(-1, ids_CM)).log()
    return logits_CV.gather(-1, ids_CM), ids_CM, log_weights_CM.float()
