"""From the student's width to the teacher's, one projector for each mapped block."""

from collections.abc import Iterable
from typing import get_args

import torch
from torch import Tensor, nn

from coldstill.pipeline.recipe.sections import ProjectorKind
from coldstill.pipeline.runtime.errors import RecipeError

_XAVIER_GAIN = 0.01


class LearnableProjector(nn.Module):
    """A linear map without bias, [..., Ds] to [..., Dt], Xavier uniform with gain 0.01: it starts near zero."""

    def __init__(self, student_dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(student_dim, teacher_dim, bias=False)
        nn.init.xavier_uniform_(self.linear.weight, gain=_XAVIER_GAIN)

    @property
    def last(self) -> nn.Linear:
        """The last linear map."""
        return self.linear

    def features(self, hidden: Tensor) -> Tensor:
        """Return what the last linear map takes: the hidden states themselves."""
        return hidden

    def forward(self, hidden: Tensor) -> Tensor:
        """Project hidden states [..., Ds]."""
        return self.linear(hidden)


class MlpProjector(nn.Module):
    """Two linear maps with a GELU between them, [..., Ds] to [..., Dt], through the teacher's width."""

    def __init__(self, student_dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.enter = nn.Linear(student_dim, teacher_dim)
        self.leave = LearnableProjector(teacher_dim, teacher_dim)

    @property
    def last(self) -> nn.Linear:
        """The last linear map."""
        return self.leave.linear

    def features(self, hidden: Tensor) -> Tensor:
        """Return what the last linear map takes, [..., Dt]."""
        return nn.functional.gelu(self.enter(hidden))

    def forward(self, hidden: Tensor) -> Tensor:
        """Project hidden states [..., Ds]."""
        return self.leave(self.features(hidden))


def check_projector(kind: str, *, student_dim: int, teacher_dim: int) -> None:
    """Refuse a kind of projector that cannot bring a student's width Ds to the teacher's Dt.

    Raises:
        RecipeError: The kind is unknown, or is `none` while the widths differ.
    """
    if kind not in get_args(ProjectorKind):
        raise RecipeError(f"projector.kind {kind!r} is unknown; one of {', '.join(get_args(ProjectorKind))}")
    if kind == "none" and student_dim != teacher_dim:
        raise RecipeError(
            f"projector.kind is none, but the student's width {student_dim} is not the teacher's {teacher_dim}; "
            "use auto"
        )


def create_projectors(
    student_blocks: Iterable[int] | None = None,
    *,
    student_dim: int,
    teacher_dim: int,
    n_layers: int | None = None,
    kind: str = "auto",
    learnable: bool = True,
    seed: int | None = None,
) -> nn.ModuleDict:
    """Make one projector for each mapped student block, by the block's index as text.

    Args:
        student_blocks: The mapped student blocks; a layer map will do. Or give `n_layers`.
        student_dim: Ds, the student's residual width.
        teacher_dim: Dt, the teacher's.
        n_layers: For the student's blocks 0 to n_layers - 1.
        kind: `auto` is the identity where the widths agree and linear elsewhere; `linear` and `mlp` are always that;
            `none` is the identity, for equal widths only.
        learnable: Whether training changes them; False keeps them as they were initialised.
        seed: Makes the initial weights a function of the seed alone; None draws from torch's global generator.

    Raises:
        RecipeError: The kind is unknown, or is `none` while the widths differ; or the blocks are given twice or not.
    """
    if (student_blocks is None) == (n_layers is None):
        given = "neither" if n_layers is None else "both"
        raise RecipeError(
            f"create_projectors takes student_blocks, the mapped ones, or n_layers, all of them: got {given}"
        )
    blocks = range(n_layers or 0) if student_blocks is None else sorted(set(student_blocks))
    check_projector(kind, student_dim=student_dim, teacher_dim=teacher_dim)
    identity = kind == "none" or (kind == "auto" and student_dim == teacher_dim)
    module = MlpProjector if kind == "mlp" else LearnableProjector
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        projectors = nn.ModuleDict(
            {str(block): nn.Identity() if identity else module(student_dim, teacher_dim) for block in blocks}
        )
    return projectors.requires_grad_(learnable)


def check_projectors(projectors: nn.ModuleDict, *, student_dim: int, teacher_dim: int) -> None:
    """Refuse projectors that do not lead from the student's width to the teacher's.

    Raises:
        RecipeError: One of them takes or gives another width.
    """
    for name, projector in projectors.items():
        # In float32, as the hidden loss gives them the student's states.
        probe = torch.zeros(1, student_dim, device=next(projector.parameters(), torch.empty(0)).device)
        try:
            with torch.no_grad():
                dim = projector(probe).shape[-1]
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise RecipeError(
                f"projector {name} does not take float32 states of the student's width {student_dim}: {reason}"
            ) from None
        if dim != teacher_dim:
            raise RecipeError(
                f"projector {name} gives width {dim} for the student's {student_dim}; expected the teacher's "
                f"{teacher_dim}"
            )
