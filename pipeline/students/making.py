"""Make a student of a teacher: cut in depth, in heads, MLPs and residual stream, then reconstructed; or designed.

Each cut measures on the model that the one before it left. Knows models and rows, not where students are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from coldstill.pipeline.models import ModelParts, take_apart, text_config
from coldstill.pipeline.recipe.student import (
    MEASURED_METHODS,
    InitConfig,
    PruneConfig,
    PruneHeadsConfig,
    PruneLayersConfig,
    PruneMlpConfig,
    ReconstructMethod,
)
from coldstill.pipeline.runtime.errors import ModelError, RecipeError
from coldstill.pipeline.students.axes import mlp_size
from coldstill.pipeline.students.cut_costs import cheapest_cuts
from coldstill.pipeline.students.depth import (
    block_importances,
    check_prune,
    choose_kept_blocks,
    cut_blocks,
    num_removed,
)
from coldstill.pipeline.students.designs import Design, block_positions, design_student
from coldstill.pipeline.students.heads import group_importances, groups_kept, narrow_heads, num_groups
from coldstill.pipeline.students.interpolation import interpolate
from coldstill.pipeline.students.pruning_report import JudgedRows, pruning_report
from coldstill.pipeline.students.reconstruction import reconstruct, why_no_reconstruction
from coldstill.pipeline.students.under_way import Channels, Span
from coldstill.pipeline.students.width import (
    channel_importances,
    most_important,
    narrow_mlps,
    narrow_stream,
    neuron_importances,
    neurons_kept,
)

_DIGITS = 6  # of importances and errors, as a record keeps them
_MEASURED_ROWS = 16  # of the calibration rows, for importances: more say the same of what goes


@dataclass(frozen=True)
class MadeStudent:
    """A student as it was made.

    Attributes:
        model: The student.
        report: What was cut and what that cost (`coldstill.pipeline.students.pruning_report`).
        kept_channels: The teacher's channel of each of its own; None where none were chosen.
    """

    model: PreTrainedModel
    report: dict[str, Any]
    kept_channels: list[int] | None = None


@dataclass(frozen=True)
class _Cut:
    """A model cut of the teacher, and the teacher's channels that it has."""

    model: PreTrainedModel
    channels_K: Tensor | None = None

    @property
    def kept_channels(self) -> list[int] | None:
        return None if self.channels_K is None else self.channels_K.tolist()


def check_student_section(section: PruneConfig | InitConfig, teacher: PreTrainedConfig) -> None:
    """Refuse, before any work, a student that cannot be made of a teacher with this config.

    Raises:
        RecipeError: It would cut what is not there, or nothing.
        ModelError: The teacher's architecture cannot be narrowed.
    """
    if isinstance(section, InitConfig):
        _design_of(section, teacher)
        return
    config = text_config(teacher)
    if section.layers is not None:
        check_prune(section.layers, num_blocks=config.num_hidden_layers)
    if section.heads is not None:
        groups = num_groups(config)
        _check_below(_groups_wanted(section.heads, groups), groups, "heads", "key-value heads")
    if section.mlp is not None:
        _check_below(
            _mlp_size_wanted(section.mlp, config.intermediate_size), config.intermediate_size, "mlp", "neurons"
        )
    if section.hidden is not None:
        _check_below(section.hidden.size, config.hidden_size, "hidden", "channels")


def num_student_blocks(section: PruneConfig | InitConfig, teacher: PreTrainedConfig) -> int:
    """Return how many blocks the student will have."""
    if isinstance(section, InitConfig):
        return _design_of(section, teacher).num_blocks
    removed = 0 if section.layers is None else num_removed(section.layers)
    return int(text_config(teacher).num_hidden_layers) - removed


def student_width(section: PruneConfig | InitConfig, teacher: PreTrainedConfig) -> int:
    """Return how many channels the student's residual stream will have."""
    if isinstance(section, InitConfig):
        return _design_of(section, teacher).hidden_size
    return int(text_config(teacher).hidden_size) if section.hidden is None else section.hidden.size


def kept_blocks_before_measuring(section: PruneConfig | InitConfig, teacher: PreTrainedConfig) -> list[int] | None:
    """Return the teacher blocks that the student will be cut from; None where only a measurement decides them."""
    num_blocks = int(text_config(teacher).num_hidden_layers)
    if isinstance(section, InitConfig):
        return _design_blocks(section, _design_of(section, teacher), num_blocks)
    if section.layers is None:
        return list(range(num_blocks))
    if section.layers.method in MEASURED_METHODS:
        return None
    return choose_kept_blocks(section.layers, num_blocks=num_blocks)


def make_student(
    section: PruneConfig | InitConfig,
    teacher: ModelParts,
    rows: Sequence[Tensor],
    judged: JudgedRows,
    *,
    show_progress: bool = True,
) -> MadeStudent:
    """Make a student; the teacher is left as it was.

    Args:
        section: How.
        teacher: The teacher.
        rows: Calibration rows of token ids, [T] each.
        judged: What it is compared with the teacher on.
        show_progress: Whether to show progress bars.

    Raises:
        ModelError: The teacher's architecture cannot be narrowed so, or its students not reconstructed.
    """
    facts: dict[str, Any] = {}
    if isinstance(section, PruneConfig):
        cut = _prune(section, teacher, rows, facts, show_progress=show_progress)
    else:
        cut = _initialise(section, teacher, rows, facts, show_progress=show_progress)
    report = {"kind": _kind(section), **pruning_report(teacher, cut.model, judged), **facts}
    return MadeStudent(cut.model, report, cut.kept_channels)


def _prune(
    section: PruneConfig, teacher: ModelParts, rows: Sequence[Tensor], facts: dict[str, Any], *, show_progress: bool
) -> _Cut:
    method = _reconstruct_method(section, teacher, rows)
    measured = rows[:_MEASURED_ROWS]
    kept = list(range(len(teacher.blocks)))
    if section.layers is not None:
        kept = _choose_blocks(section.layers, teacher, measured, facts, show_progress=show_progress)
    parts = take_apart(cut_blocks(teacher, kept))
    if section.heads is not None:
        importances = group_importances(parts, measured)
        wanted = _groups_wanted(section.heads, num_groups(parts.model.config))
        parts = take_apart(narrow_heads(parts, [most_important(of_block, wanted) for of_block in importances]))
    if section.mlp is not None:
        wanted = _mlp_size_wanted(section.mlp, mlp_size(parts))
        parts = take_apart(_narrow_mlps(parts, wanted, measured, method=section.mlp.method))
    channels_K = None
    if section.hidden is not None:
        channels_K = most_important(channel_importances(parts, measured), section.hidden.size)
        parts = take_apart(narrow_stream(parts, channels_K, rows))
    stands_for = Span.between(kept, len(teacher.blocks))
    channels = Channels.kept(channels_K)
    facts |= _reconstruct(method, parts, teacher, rows, stands_for, channels, show_progress=show_progress)
    return _Cut(parts.model, channels_K)


def _choose_blocks(
    layers: PruneLayersConfig,
    teacher: ModelParts,
    rows: Sequence[Tensor],
    facts: dict[str, Any],
    *,
    show_progress: bool,
) -> list[int]:
    """Return the blocks that stay, and keep what they were chosen by."""
    importances = cheapest = None
    if layers.method == "importance":
        importances = block_importances(teacher, rows)
        facts["block_importances"] = [round(value, _DIGITS) for value in importances]
    elif layers.method == "kl":
        assert layers.remove is not None
        rounds = cheapest_cuts(teacher, rows, remove=layers.remove, show_progress=show_progress)
        facts["cut_costs"] = [cut.record() for cut in rounds]
        cheapest = [cut.removed for cut in rounds]
    return choose_kept_blocks(layers, num_blocks=len(teacher.blocks), importances=importances, cheapest=cheapest)


def _reconstruct_method(
    section: PruneConfig | InitConfig, teacher: ModelParts, rows: Sequence[Tensor]
) -> ReconstructMethod | None:
    """Return how a student is reconstructed; None where it is not."""
    if section.reconstruct is False:
        return None
    methods: list[ReconstructMethod] = ["blocks", "linear"] if section.reconstruct == "auto" else [section.reconstruct]
    reasons = [why_no_reconstruction(teacher, rows[0], method) for method in methods]
    for method, why in zip(methods, reasons, strict=True):
        if why is None:
            return method
    if section.reconstruct == "auto":
        return None
    key = f"student.{'init' if isinstance(section, InitConfig) else 'prune'}.reconstruct"
    raise ModelError(
        f"{key} is {section.reconstruct}, but students of {type(teacher.model).__name__} cannot be reconstructed so: "
        f"{reasons[0]}; set it to auto or false"
    )


def _reconstruct(
    method: ReconstructMethod | None,
    student: ModelParts,
    teacher: ModelParts,
    rows: Sequence[Tensor],
    stands_for: Sequence[Span],
    channels: Channels,
    *,
    show_progress: bool,
) -> dict[str, Any]:
    """Reconstruct a student, where it is to be; return the facts for the report."""
    if method is None:
        return {"reconstructed": False}
    errors = reconstruct(
        student,
        teacher,
        rows,
        stands_for=stands_for,
        channels=channels,
        method=method,
        show_progress=show_progress,
    )
    return {"reconstructed": method, "stream_errors": [round(error, _DIGITS) for error in errors]}


def _initialise(
    section: InitConfig, teacher: ModelParts, rows: Sequence[Tensor], facts: dict[str, Any], *, show_progress: bool
) -> _Cut:
    design = _design_of(section, teacher.model.config)
    method = _reconstruct_method(section, teacher, rows)
    channels_K, channels = None, Channels.kept(None)
    if section.weights == "interpolate":
        parts = take_apart(interpolate(teacher, design))
        channels = Channels.interpolated(design.hidden_size)
    else:
        parts, channels_K = _copy(section, design, teacher, rows)
        channels = Channels.kept(channels_K)
    stands_for = Span.between(_first_blocks(section, design, len(teacher.blocks)), len(teacher.blocks))
    facts |= _reconstruct(method, parts, teacher, rows, stands_for, channels, show_progress=show_progress)
    return _Cut(parts.model, channels_K)


def _copy(
    section: InitConfig, design: Design, teacher: ModelParts, rows: Sequence[Tensor]
) -> tuple[ModelParts, Tensor | None]:
    """Make a designed student of the teacher's own weights; return it and the channels that it has, if fewer."""
    parts = take_apart(cut_blocks(teacher, _first_blocks(section, design, len(teacher.blocks))))
    copies, measured = section.weights == "copy", rows[:_MEASURED_ROWS]
    if design.mlp_size < mlp_size(parts):
        if copies:
            parts = take_apart(_narrow_mlps(parts, design.mlp_size, measured, method="activations"))
        else:
            parts = take_apart(narrow_mlps(parts, [torch.arange(design.mlp_size)] * len(parts.blocks)))
    if design.hidden_size == parts.hidden_size:
        return parts, None
    channels_K = torch.arange(design.hidden_size)
    if copies:
        channels_K = most_important(channel_importances(parts, measured), design.hidden_size)
    return take_apart(narrow_stream(parts, channels_K, rows if copies else [])), channels_K


def _narrow_mlps(parts: ModelParts, size: int, rows: Sequence[Tensor], *, method: str) -> PreTrainedModel:
    importances = neuron_importances(parts, rows, method=method)
    return narrow_mlps(parts, [most_important(of_block, size) for of_block in importances])


def _design_of(section: InitConfig, teacher: PreTrainedConfig) -> Design:
    return design_student(teacher, parameters=section.parameters, compression=section.compression, shape=section.shape)


def _design_blocks(section: InitConfig, design: Design, num_blocks: int) -> list[int] | None:
    """Return the teacher blocks that a designed student takes; None where its blocks lie between them."""
    return None if section.weights == "interpolate" else _first_blocks(section, design, num_blocks)


def _first_blocks(section: InitConfig, design: Design, num_blocks: int) -> list[int]:
    """Return the first of the teacher blocks that each block of a designed student stands for."""
    if section.weights == "truncate":
        return list(range(design.num_blocks))
    return [round(position) for position in block_positions(num_blocks, design.num_blocks)]


def _mlp_size_wanted(section: PruneMlpConfig, size: int) -> int:
    return section.size if section.size is not None else neurons_kept(section.keep or 1.0, size)


def _groups_wanted(section: PruneHeadsConfig, groups: int) -> int:
    return section.size if section.size is not None else groups_kept(section.keep or 1.0, groups)


def _check_below(wanted: int, size: int, section: str, what: str) -> None:
    if wanted >= size:
        raise RecipeError(
            f"student.prune.{section} keeps {wanted} {what}, but the teacher has {size}: nothing would be cut"
        )


def _kind(section: PruneConfig | InitConfig) -> str:
    if isinstance(section, InitConfig):
        return "init"
    return "depth_and_width" if section.is_deep and section.is_wide else "depth" if section.is_deep else "width"
