"""The three terms of the loss, as pure tensor functions. No config, no I/O.

Position t predicts token t+1; the caller has shifted. Everything is computed in float32 and in nats. Each term is a sum
over positions divided by `num_positions`, which the caller may have counted over more than this batch, so that a batch
accumulated in parts has the loss and gradient of the whole.
Shapes: N positions that count, K stored tokens, V vocabulary, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_SMALLEST_VARIANCE = 1e-12
_SMALLEST_NORM = 1e-8


def cross_entropy(student_logits_NV: Tensor, next_tokens_N: Tensor, *, num_positions: Tensor | float) -> Tensor:
    """Cross entropy with the tokens that follow, in nats.

    Args:
        student_logits_NV: Of any floating dtype.
        next_tokens_N: Token ids, int64.
        num_positions: What the sum over the N positions is divided by.
    """
    return F.cross_entropy(student_logits_NV.float(), next_tokens_N, reduction="sum") / num_positions


def bucketed_kl(
    student_logits_NV: Tensor,
    top_logits_NK: Tensor,
    top_ids_NK: Tensor,
    log_normaliser_N: Tensor,
    *,
    temperature: float,
    num_positions: Tensor | float,
) -> Tensor:
    """KL(teacher || student) over the K stored tokens and one bucket for the rest, times temperature squared.

    Merging tokens into a bucket can only lower a KL (data processing inequality), so it is a lower bound of the KL over
    the whole vocabulary; with K = V it is that KL, what `F.kl_div(log_softmax(student / T), softmax(teacher / T))` sums
    to. The factor T^2 keeps the gradient's size when the temperature changes (Hinton et al., arXiv 1503.02531).
    Zero where student and teacher agree, and never negative beyond the rounding of float32.

    Args:
        student_logits_NV: Of any floating dtype.
        top_logits_NK: The teacher's largest logits, at temperature 1.
        top_ids_NK: Their token ids, int64, all different.
        log_normaliser_N: The teacher's logsumexp over the whole vocabulary of logits / temperature.
        temperature: What logits are divided by.
        num_positions: What the sum over the N positions is divided by.
    """
    logits_NV = student_logits_NV.float() / temperature
    normaliser_N1 = logits_NV.logsumexp(dim=-1, keepdim=True)
    student_logprobs_NK = logits_NV.gather(-1, top_ids_NK) - normaliser_N1
    teacher_logprobs_NK = top_logits_NK / temperature - log_normaliser_N.unsqueeze(-1)
    stored_NK = teacher_logprobs_NK.exp()
    rest_N1 = (1.0 - stored_NK.sum(dim=-1, keepdim=True)).clamp(min=0.0)
    if top_ids_NK.shape[-1] == logits_NV.shape[-1]:
        divergence_N = _kl(stored_NK, teacher_logprobs_NK, student_logprobs_NK)
    else:
        # The rest's logsumexp is taken over the rest itself: one minus the stored mass would lose all its digits
        # where the student is sure.
        rest_logprob_N1 = logits_NV.scatter(-1, top_ids_NK, -torch.inf).logsumexp(dim=-1, keepdim=True) - normaliser_N1
        total_N1 = stored_NK.sum(dim=-1, keepdim=True) + rest_N1
        teacher_NB = torch.cat([stored_NK, rest_N1], dim=-1) / total_N1
        student_logprobs_NB = torch.cat([student_logprobs_NK, rest_logprob_N1], dim=-1)
        # Rounded stored logits may sum to a little over one; divided by their total they are a distribution again.
        divergence_N = _kl(teacher_NB, teacher_NB.clamp(min=torch.finfo(torch.float32).tiny).log(), student_logprobs_NB)
    return divergence_N.sum() * temperature**2 / num_positions


def hidden_mse(student_ND: Tensor, teacher_ND: Tensor, *, num_positions: Tensor | float) -> Tensor:
    """Mean squared error over channels, summed over positions: ruled by the positions and channels of largest scale."""
    return (student_ND.float() - teacher_ND).square().mean(dim=-1).sum() / num_positions


def hidden_normalised_mse(student_ND: Tensor, teacher_ND: Tensor, *, num_positions: Tensor | float) -> Tensor:
    """Squared error of each position as a share of the teacher's variance over channels there.

    1 is what a student that gives the teacher's mean over channels would get; a position of huge norm, such as the
    first of a row, counts as any other.
    """
    variance_N = teacher_ND.var(dim=-1, correction=0).clamp(min=_SMALLEST_VARIANCE)
    return ((student_ND.float() - teacher_ND).square().mean(dim=-1) / variance_N).sum() / num_positions


def hidden_cosine(student_ND: Tensor, teacher_ND: Tensor, *, num_positions: Tensor | float) -> Tensor:
    """One minus the cosine of student and teacher, at each position: blind to scale."""
    return (1.0 - F.cosine_similarity(student_ND.float(), teacher_ND, dim=-1, eps=_SMALLEST_NORM)).sum() / num_positions


HIDDEN_LOSSES = {"mse": hidden_mse, "normalised_mse": hidden_normalised_mse, "cosine": hidden_cosine}


def _kl(teacher_NB: Tensor, teacher_logprobs_NB: Tensor, student_logprobs_NB: Tensor) -> Tensor:
    # A probability of zero contributes nothing, whatever the other logarithm is.
    terms_NB = teacher_NB * (teacher_logprobs_NB - student_logprobs_NB)
    return terms_NB.where(teacher_NB > 0, 0.0).sum(dim=-1)
