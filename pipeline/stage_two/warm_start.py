"""Projectors that begin as the least-squares maps from the untrained student's states to the teacher's stored ones."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from coldstill.pipeline.losses.hidden import Hidden
from coldstill.pipeline.models.projectors import LearnableProjector, MlpProjector
from coldstill.pipeline.stage_two.distiller import Distiller

# Added to the diagonal, as a share of its mean: directions that the student hardly uses stay small.
_RIDGE = 1e-6


@torch.no_grad()
def fit_projectors(distiller: Distiller, batches: Iterable[Mapping[str, Any]]) -> None:
    """Set the last linear map of each projector to the one of least squared error over some batches.

    Each position weighs what it weighs in the hidden loss; where there is no such term, all weigh the same. Solved in
    float64 by the normal equations (X'X + ridge) W' = X'Y, which are summed batch by batch; projectors without a linear
    map are left as they are.

    Args:
        distiller: Student and projectors.
        batches: Arguments of its forward, on its device.
    """
    hidden = next((term for term in distiller.objective.terms if isinstance(term, Hidden)), None)
    fitted: dict[str, LearnableProjector | MlpProjector] = {}
    grams: dict[str, Tensor] = {}
    crosses: dict[str, Tensor] = {}
    was_training = distiller.training
    distiller.eval()
    for batch in batches:
        for name, student_ND, teacher_ND, weights_N in distiller.state_pairs(batch):
            projector = distiller.projectors[name]
            if not isinstance(projector, LearnableProjector | MlpProjector):
                continue
            fitted[name] = projector
            features_NF = projector.features(student_ND).double()
            weighted_NF = features_NF
            if hidden is not None:
                weight_N = hidden.position_weights(teacher_ND, distiller.scales.states.get(int(name)))
                weighted_NF = weighted_NF * weight_N.double().unsqueeze(-1)
            if weights_N is not None:
                weighted_NF = weighted_NF * weights_N.double().unsqueeze(-1)
            grams[name] = grams.get(name, 0) + weighted_NF.T @ features_NF
            crosses[name] = crosses.get(name, 0) + weighted_NF.T @ teacher_ND.double()
    distiller.train(was_training)
    for name, gram_FF in grams.items():
        gram_FF.diagonal().add_(_RIDGE * gram_FF.diagonal().mean())
        weight_FD = torch.linalg.solve(gram_FF, crosses[name])
        fitted[name].last.weight.copy_(weight_FD.T)
