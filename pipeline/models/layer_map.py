"""Which teacher block each student block learns from. Block indices are 0-based decoder block outputs."""

from collections.abc import Mapping, Sequence
from typing import get_args

from coldstill.pipeline.recipe.sections import MappingStrategy
from coldstill.pipeline.runtime.errors import RecipeError


def create_layer_map(
    n_student: int,
    n_teacher: int,
    strategy: str = "uniform",
    *,
    kept_blocks: Sequence[int] | None = None,
    pairs: Mapping[int, int] | None = None,
) -> dict[int, int]:
    """Map student blocks to teacher blocks.

    For student block s of n_s and teacher blocks 0 to n_t - 1:
    `uniform` s n_t // n_s; `last` s + n_t - n_s; `stride` (s + 1) n_t // n_s - 1, whose ends meet;
    `endpoints` s (n_t - 1) // (n_s - 1), whose first and last meet; `kept` the block that s was cut from;
    `covered` the last of the blocks that s stands for, which is the one in front of the block that s + 1 was cut from:
    where blocks behind s went, a reconstructed s gives what they gave; `pairs` as given.

    Args:
        n_student: Number of the student's decoder blocks.
        n_teacher: Number of the teacher's; at least as many.
        strategy: One of `coldstill.pipeline.recipe.sections.MappingStrategy`.
        kept_blocks: For `kept` and `covered`: the teacher block of each student block, from the student's config.
        pairs: For `pairs`: student block to teacher block.

    Returns:
        Student block to teacher block, in the student's order.

    Raises:
        RecipeError: The strategy is unknown, needs what is not there, or names a block that does not exist.
    """
    if n_student < 1 or n_teacher < n_student:
        raise RecipeError(f"mapping needs 1 to {n_teacher} student blocks, as many as the teacher has, got {n_student}")
    students = range(n_student)
    if strategy == "uniform":
        return {s: s * n_teacher // n_student for s in students}
    if strategy == "last":
        return {s: s + n_teacher - n_student for s in students}
    if strategy == "stride":
        return {s: (s + 1) * n_teacher // n_student - 1 for s in students}
    if strategy == "endpoints":
        # A single block has no first to meet: it learns from the last.
        return {s: s * (n_teacher - 1) // (n_student - 1) for s in students} if n_student > 1 else {0: n_teacher - 1}
    if strategy == "kept":
        return dict(enumerate(_check_kept(strategy, n_student, n_teacher, kept_blocks)))
    if strategy == "covered":
        kept = _check_kept(strategy, n_student, n_teacher, kept_blocks)
        return dict(enumerate([*(block - 1 for block in kept[1:]), n_teacher - 1]))
    if strategy == "pairs":
        return check_pairs(pairs or {}, n_student=n_student, n_teacher=n_teacher, name="mapping.pairs")
    raise RecipeError(f"mapping.strategy {strategy!r} is unknown; one of {', '.join(get_args(MappingStrategy))}")


def spread_pairs(layer_map: Mapping[int, int], num_pairs: int | None) -> dict[int, int]:
    """Keep that many pairs of a map, evenly spaced and with the last block among them; all of them where it is None.

    Raises:
        RecipeError: The map has fewer pairs.
    """
    if num_pairs is None:
        return dict(layer_map)
    if num_pairs > len(layer_map):
        raise RecipeError(f"mapping.num_pairs is {num_pairs}, but the student has {len(layer_map)} blocks")
    students = sorted(layer_map)
    chosen = [students[(index + 1) * len(students) // num_pairs - 1] for index in range(num_pairs)]
    return {student: layer_map[student] for student in chosen}


def _check_kept(strategy: str, n_student: int, n_teacher: int, kept_blocks: Sequence[int] | None) -> Sequence[int]:
    if kept_blocks is None:
        raise RecipeError(
            f"mapping.strategy {strategy} needs a student that coldstill prune cut; its config names no kept_blocks: "
            "use another strategy"
        )
    if len(kept_blocks) != n_student or any(not 0 <= block < n_teacher for block in kept_blocks):
        raise RecipeError(
            f"the student's config names kept_blocks {list(kept_blocks)}; expected {n_student} blocks below {n_teacher}"
        )
    return kept_blocks


def check_pairs(pairs: Mapping[int, int], *, n_student: int, n_teacher: int, name: str) -> dict[int, int]:
    """Return pairs of student and teacher block in the student's order; `name` is what an error calls them.

    Raises:
        RecipeError: One of them names a block that does not exist.
    """
    for student, teacher in pairs.items():
        if not 0 <= student < n_student:
            raise RecipeError(f"{name} names student block {student}; the student has blocks 0 to {n_student - 1}")
        if not 0 <= teacher < n_teacher:
            raise RecipeError(f"{name} names teacher block {teacher}; the teacher has blocks 0 to {n_teacher - 1}")
    return {student: pairs[student] for student in sorted(pairs)}
