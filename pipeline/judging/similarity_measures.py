"""How alike the states of two models are. Pure tensor functions in float32; no model, no store.

Shapes: N positions, D width, Ds and Dt widths of student and teacher, S student blocks, R teacher blocks.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

States = Mapping[int, Tensor]


def mean_cosine(student_ND: Tensor, teacher_ND: Tensor) -> float:
    """Return the cosine of two states of one width, averaged over positions."""
    return float(F.cosine_similarity(student_ND.float(), teacher_ND.float(), dim=-1).mean())


def cosine_matrix(student: States, teacher: States) -> list[list[float]]:
    """Return the mean cosine of each student block's states [N, D] with each teacher block's, [S, R]."""
    units = {block: F.normalize(states_ND.float(), dim=-1) for block, states_ND in teacher.items()}
    matrix = []
    for states_ND in student.values():
        unit_ND = F.normalize(states_ND.float(), dim=-1)
        matrix.append([float((unit_ND * other_ND).sum(dim=-1).mean()) for other_ND in units.values()])
    return matrix


def cka_matrix(student: States, teacher: States) -> list[list[float]]:
    """Return the linear CKA of each student block's states [N, Ds] with each teacher block's [N, Dt], [S, R].

    Between 0 and 1, blind to rotation and scale, and defined for any two widths; it needs more positions than channels
    to say much (Kornblith et al., ICML 2019).
    """
    own = {block: _centred(states_ND) for block, states_ND in student.items()}
    other = {block: _centred(states_ND) for block, states_ND in teacher.items()}
    norms = {block: _cross_energy(states_ND, states_ND).sqrt() for block, states_ND in other.items()}
    matrix = []
    for states_ND in own.values():
        norm = _cross_energy(states_ND, states_ND).sqrt()
        energies = {block: _cross_energy(states_ND, other_ND) for block, other_ND in other.items()}
        matrix.append([float(energy / (norm * norms[block])) for block, energy in energies.items()])
    return matrix


def _centred(states_ND: Tensor) -> Tensor:
    centred_ND = states_ND.float() - states_ND.float().mean(dim=0)
    # CKA does not depend on scale; fourth powers of the residual stream's would leave float32's range.
    return centred_ND / centred_ND.norm().clamp(min=torch.finfo(torch.float32).tiny)


def _cross_energy(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    return (a_ND.T @ b_ND).square().sum()
