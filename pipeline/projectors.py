"""From the student's width to the teacher's, one projector for each mapped block."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from cache.errors import RecipeError

KINDS = ("auto", "linear", "mlp", "none")
_XAVIER_GAIN = 0.01


class LearnableProjector(nn.Module):
    """A linear map without bias, [..., Ds] to [..., Dt], Xavier uniform with gain 0.01: it starts near zero."""

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(student_width, teacher_width, bias=False)
        nn.init.xavier_uniform_(self.linear.weight, gain=_XAVIER_GAIN)

    @property
    def last(self) -> nn.Linear:
        """The last linear map."""
        return self.linear

    def features(self, hidden: Tensor) -> Tensor:
        """Give what the last linear map takes: the hidden states themselves."""
        return hidden

    def forward(self, hidden: Tensor) -> Tensor:
        """Project hidden states [..., Ds]."""
        return self.linear(hidden)


class MlpProjector(nn.Module):
    """Two linear maps with a GELU between them, [..., Ds] to [..., Dt], through the teacher's width."""

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(student_width, teacher_width)
        self.leave = LearnableProjector(teacher_width, teacher_width)

    @property
    def last(self) -> nn.Linear:
        """The last linear map."""
        return self.leave.linear

    def features(self, hidden: Tensor) -> Tensor:
        """Give what the last linear map takes, [..., Dt]."""
        return nn.functional.gelu(self.enter(hidden))

    def forward(self, hidden: Tensor) -> Tensor:
        """Project hidden states [..., Ds]."""
        return self.leave(self.features(hidden))


def check_projector(kind: str, *, student_width: int, teacher_width: int) -> None:
    """Refuse a kind of projector that cannot bring a student's width Ds to the teacher's Dt.

    Raises:
        RecipeError: The kind is unknown, or is `none` while the widths differ.
    """
    if kind not in KINDS:
        raise RecipeError(f"projector.kind {kind!r} is unknown; one of {', '.join(KINDS)}")
    if kind == "none" and student_width != teacher_width:
        raise RecipeError(
            f"projector.kind is none, but the student's width {student_width} is not the teacher's {teacher_width}; "
            "use auto"
        )


def create_projectors(
    student_blocks: Iterable[int],
    *,
    student_width: int,
    teacher_width: int,
    kind: str = "auto",
    learnable: bool = True,
    seed: int | None = None,
) -> nn.ModuleDict:
    """Make one projector for each mapped student block, by the block's index as text.

    Args:
        student_blocks: The mapped student blocks.
        student_width: Ds, the student's residual width.
        teacher_width: Dt, the teacher's.
        kind: `auto` is the identity where the widths agree and linear elsewhere; `linear` and `mlp` are always that;
            `none` is the identity, for equal widths only.
        learnable: Whether training changes them; False keeps them as they were initialised.
        seed: Makes the initial weights a function of the seed alone; None draws from torch's global generator.

    Raises:
        RecipeError: The kind is unknown, or is `none` while the widths differ.
    """
    check_projector(kind, student_width=student_width, teacher_width=teacher_width)
    identity = kind == "none" or (kind == "auto" and student_width == teacher_width)
    module = MlpProjector if kind == "mlp" else LearnableProjector
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        projectors = nn.ModuleDict(
            {
                str(block): nn.Identity() if identity else module(student_width, teacher_width)
                for block in sorted(set(student_blocks))
            }
        )
    return projectors.requires_grad_(learnable)
