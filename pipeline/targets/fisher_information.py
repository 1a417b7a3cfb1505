"""The Fisher information of an output head: by which errors of the final state the distributions change.

Only a few words of the vocabulary are at hand at once, twice: first for the normalisers of all positions, then for what
is summed over the words. So a vocabulary of hundreds of thousands asks for no more memory than a small one.
Shapes: N positions, D width, V vocabulary, C words of a chunk.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from coldstill.pipeline.models.output_head import OutputHead

# Temperatures, and what each of them weighs.
_TEMPERATURES = ((1.0, 0.7), (2.0, 0.3))

OnWords = Callable[[int], None]


@torch.no_grad()
def fisher_information(states_ND: Tensor, head: OutputHead, *, on_words: OnWords = lambda _: None) -> Tensor:
    """Return the output head's mean Fisher information over states, [D, D] in float64, temperatures 1 and 2 weighted.

    F(T) = mean of J' (diag p - p p') J with p = softmax(logits / T) and J the Jacobian of the logits: half of an
    error's square under F(T) is T^2 times the KL that it makes at T, to second order. The sum over positions is taken
    before the one over words, so that W' diag(.) W is one product. Products are in float32, whatever the head is in.

    Args:
        states_ND: The states.
        head: The output head.
        on_words: Told how many words are done with; all words are gone through twice.
    """
    num_positions, width = states_ND.shape
    states_ND = states_ND.float()
    normalisers_TN = torch.full((len(_TEMPERATURES), num_positions), -torch.inf, device=states_ND.device)
    for words in head.words(num_positions):
        logits_NC = words(states_ND)
        for index, (temperature, _) in enumerate(_TEMPERATURES):
            of_chunk_N = (logits_NC / temperature).logsumexp(dim=-1)
            normalisers_TN[index] = torch.logaddexp(normalisers_TN[index], of_chunk_N)
        on_words(words.vocab_size)
    total_DD = torch.zeros(width, width, dtype=torch.float64, device=states_ND.device)
    means_TND = torch.zeros(len(_TEMPERATURES), num_positions, width, device=states_ND.device)
    for words in head.words(num_positions):
        logits_NC = words(states_ND)
        slope_NC = words.slope(logits_NC)
        diagonal_C = torch.zeros(words.vocab_size, device=states_ND.device)
        for index, (temperature, weight) in enumerate(_TEMPERATURES):
            sloped_NC = (logits_NC / temperature - normalisers_TN[index].unsqueeze(1)).exp_().mul_(slope_NC)
            means_TND[index] += sloped_NC @ words.weight_VD
            diagonal_C += weight * (sloped_NC.mul_(slope_NC)).sum(dim=0)
        total_DD += words.weight_VD.T @ (diagonal_C.unsqueeze(1) * words.weight_VD)
        on_words(words.vocab_size)
    for mean_ND, (_, weight) in zip(means_TND, _TEMPERATURES, strict=True):
        total_DD -= weight * (mean_ND.T @ mean_ND)
    return total_DD / num_positions
