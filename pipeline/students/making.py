"""Make a student of a teacher: cut in depth, in heads, MLPs and residual stream, then reconstructed; or designed.

Each cut measures on the model that the one before it left. Knows models and rows, not where students are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from coldstill.pipeline.models import ModelParts, kept_blocks_of, take_apart, text_config
from coldstill.pipeline.recipe.student import (
    MEASURED_METHODS,
    InitConfig,
    PruneConfig,
    PruneHeadsConfig,
    PruneLayersConfig,
    PruneMlpConfig,
    Reconstruct,
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
from coldstill.pipeline.students.width import (
    channel_importances,
    most_important,
    narrow_mlps,
    narrow_stream,
    neuron_importances,
    neurons_kept,
)

_DIGITS = 6  # of importances, as a record keeps them


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
        cut = _initialise(section, teacher, rows, facts)
    report = {"kind": _kind(section), **pruning_report(teacher, cut.model, judged), **facts}
    return MadeStudent(cut.model, report, cut.kept_channels)


def _prune(
    section: PruneConfig, teacher: ModelParts, rows: Sequence[Tensor], facts: dict[str, Any], *, show_progress: bool
) -> _Cut:
    facts["reconstructed"] = section.wants_reconstruction and _can_reconstruct(section.reconstruct, teacher, rows)
    kept = list(range(len(teacher.blocks)))
    if section.layers is not None:
        kept = _choose_blocks(section.layers, teacher, rows, facts, show_progress=show_progress)
    parts = take_apart(cut_blocks(teacher, kept))
    if section.heads is not None:
        importances = group_importances(parts, rows)
        wanted = _groups_wanted(section.heads, num_groups(parts.model.config))
        parts = take_apart(narrow_heads(parts, [most_important(of_block, wanted) for of_block in importances]))
    if section.mlp is not None:
        wanted = _mlp_size_wanted(section.mlp, mlp_size(parts))
        parts = take_apart(_narrow_mlps(parts, wanted, rows, method=section.mlp.method))
    channels_K = None
    if section.hidden is not None:
        channels_K = most_important(channel_importances(parts, rows), section.hidden.size)
        parts = take_apart(narrow_stream(parts, channels_K, rows))
    if facts["reconstructed"]:
        _reconstruct(parts, teacher, rows, channels_K)
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


def _can_reconstruct(wanted: Reconstruct, teacher: ModelParts, rows: Sequence[Tensor]) -> bool:
    why = why_no_reconstruction(teacher, rows[0])
    if why is not None and wanted is True:
        raise ModelError(
            f"student.prune.reconstruct is true, but students of {type(teacher.model).__name__} cannot be "
            f"reconstructed: {why}; set it to auto or false"
        )
    return why is None


def _reconstruct(student: ModelParts, teacher: ModelParts, rows: Sequence[Tensor], channels_K: Tensor | None) -> None:
    blocks = kept_blocks_of(student.model.config)
    assert blocks is not None
    if channels_K is None:
        channels_K = torch.arange(teacher.hidden_size)
    reconstruct(student, teacher, rows, kept_blocks=blocks, channels_K=channels_K)


def _initialise(section: InitConfig, teacher: ModelParts, rows: Sequence[Tensor], facts: dict[str, Any]) -> _Cut:
    design = _design_of(section, teacher.model.config)
    facts["reconstructed"] = False
    if section.weights == "interpolate":
        return _Cut(interpolate(teacher, design))
    blocks = _design_blocks(section, design, len(teacher.blocks))
    assert blocks is not None
    parts = take_apart(cut_blocks(teacher, blocks))
    copies = section.weights == "copy"
    cuts_mlps, cuts_stream = design.mlp_size < mlp_size(parts), design.hidden_size < parts.hidden_size
    if cuts_mlps:
        if copies:
            parts = take_apart(_narrow_mlps(parts, design.mlp_size, rows, method="activations"))
        else:
            parts = take_apart(narrow_mlps(parts, [torch.arange(design.mlp_size)] * len(parts.blocks)))
    channels_K = None
    if cuts_stream:
        channels_K = torch.arange(design.hidden_size)
        if copies:
            channels_K = most_important(channel_importances(parts, rows), design.hidden_size)
        parts = take_apart(narrow_stream(parts, channels_K, rows if copies else []))
    if copies and (cuts_mlps or cuts_stream) and _can_reconstruct("auto", teacher, rows):
        facts["reconstructed"] = True
        _reconstruct(parts, teacher, rows, channels_K)
    return _Cut(parts.model, channels_K)


def _narrow_mlps(parts: ModelParts, size: int, rows: Sequence[Tensor], *, method: str) -> PreTrainedModel:
    importances = neuron_importances(parts, rows, method=method)
    return narrow_mlps(parts, [most_important(of_block, size) for of_block in importances])


def _design_of(section: InitConfig, teacher: PreTrainedConfig) -> Design:
    return design_student(teacher, parameters=section.parameters, compression=section.compression, shape=section.shape)


def _design_blocks(section: InitConfig, design: Design, num_blocks: int) -> list[int] | None:
    """Return the teacher blocks that a designed student takes; None where its blocks lie between them."""
    if section.weights == "interpolate":
        return None
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
