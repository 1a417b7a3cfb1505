"""The sections of a run's report on blocks: the layer map, how alike blocks are, and what the projectors do."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from coldstill.pipeline.figures.blocks import heatmap_figure, pairs_figure
from coldstill.pipeline.figures.curves import spectrum_figure
from coldstill.pipeline.figures.layers import layer_map_figure
from coldstill.pipeline.figures.sheet import LIGHT
from coldstill.pipeline.pages.data import RunRecord
from coldstill.pipeline.pages.numbers import heading, show_measure
from coldstill.pipeline.pages.page import Beside, Block, Figures, Missing, Section, Table, Words

if TYPE_CHECKING:
    from coldstill.pipeline.judging.similarity import BlockSimilarity, ProjectedPair


def layers_section(run: RunRecord) -> Section:
    """Draw which blocks were removed and who learns from whom, and say what was cut."""
    title, blocks = "Layer map", list[Block]()
    num_teacher = run.num_teacher_blocks
    if num_teacher is None:
        blocks.append(Missing(f"How many blocks the teacher has is not known any more: {run.store_problem}"))
    else:
        caption = "A line joins a student block and the teacher block that it learns from; dashed blocks were removed."
        if run.kept_blocks is not None:
            caption += " A student block stands beside the one that it was cut from."
        figure = layer_map_figure(
            "layer-map",
            run.layer_map,
            num_student_blocks=run.num_student_blocks,
            num_teacher_blocks=num_teacher,
            kept_blocks=run.kept_blocks,
            caption=caption,
        )
        blocks.append(Figures([figure]))
    if not run.layer_map:
        blocks.append(Missing("No block learned from another: loss.gamma and loss.delta are 0."))
    if run.pruning is not None:
        blocks.append(_pruning_table(run.pruning))
    return Section("layers", title, [Beside(blocks)])


def _pruning_table(pruning: Mapping[str, Any]) -> Table:
    parts = {
        "parameters": "parameters",
        "heads": "attention heads a block",
        "mlp": "MLP neurons a block",
        "hidden": "residual channels",
    }
    rows = [
        [words, f"{pruning[name]['teacher']:,}", f"{pruning[name]['student']:,}"]
        for name, words in parts.items()
        if (pruning.get(name) or {}).get("teacher") is not None
    ]
    if pruning.get("blocks"):
        rows.insert(0, ["blocks", str(pruning["blocks"]["teacher"]), str(len(pruning["blocks"]["kept"]))])
    calibration = pruning.get("judged") or {}
    for measure in ("loss", "perplexity"):
        if measure in calibration:
            values = [show_measure(measure, calibration[measure][model]) for model in ("teacher", "student")]
            rows.append([f"{heading(measure)} on calibration rows", *values])
    return Table("What was cut, before any training.", ["", "teacher", "student"], rows)


def similarity_section(run: RunRecord, found: "BlockSimilarity | str") -> Section:
    """Draw how alike student and teacher blocks are, before and after training; a text says why nobody knows."""
    title = "Block similarity"
    if isinstance(found, str):
        return Section("similarity", title, [Missing(f"Blocks could not be compared: {found}")])
    is_cosine = found.measure == "cosine"
    values = [value for matrix in (found.pruned, found.recovered) for row in matrix for value in row]
    unit = "mean cosine" if is_cosine else "linear CKA"
    figures = [
        heatmap_figure(
            f"similarity-{when}",
            f"Student and teacher blocks, {when} training",
            matrix,
            columns=found.teacher_blocks,
            pairs=run.layer_map,
            unit=unit,
            limits=(min(values), max(values)),
            caption=f"The brighter, the more alike (both figures share one scale); rings are mapped pairs; {who}.",
        )
        for when, matrix, who in (
            ("before", found.pruned, "this is the pruned student"),
            ("after", found.recovered, "this is the recovered student"),
        )
    ]
    how = (
        "the cosine of the two states, over the teacher's channels that the student has, averaged over positions"
        if is_cosine
        else "linear CKA (Kornblith et al., 2019), as the widths differ and nothing says which channels correspond"
    )
    said = (
        f"Measured on {found.num_positions:,} positions of {found.num_rows} eval rows: {how}. The first position of a "
        "row, where most models keep an attention sink, is left out."
    )
    if run.num_teacher_blocks != len(found.teacher_blocks):
        said += (
            f" The store has {len(found.teacher_blocks)} of the teacher's blocks; more come with targets.hidden.blocks "
            "and coldstill precompute."
        )
    return Section("similarity", title, [Figures(figures), Words(said)])


def projectors_section(run: RunRecord, found: "BlockSimilarity | str") -> Section:
    """Draw the singular values of the projectors, and how near mapped pairs are before and after them."""
    title = "Projectors"
    if not run.layer_map:
        why = "No block learned from another, so there is no projector; set loss.gamma above 0, and train again."
        return Section("projectors", title, [Missing(why)])
    if isinstance(found, str):
        return Section("projectors", title, [Missing(f"Mapped pairs could not be compared: {found}")])
    if not found.pairs:
        why = "The store has no mapped teacher block of the eval rows; run: coldstill precompute"
        return Section("projectors", title, [Missing(why)])
    linear = [pair for pair in found.pairs if pair.singular_values is not None]
    figures, blocks = [], list[Block]()
    if linear:
        figures.append(_spectrum(linear))
    else:
        kind = "is no single linear map" if run.recipe.projector.kind == "mlp" else "is the identity"
        blocks.append(Missing(f"The projector of each pair {kind}, so it has no singular values to draw."))
    figures.append(
        pairs_figure(
            "pairs-cosine",
            "Mapped pairs, before and after",
            [(f"{pair.student} → {pair.teacher}", _cosines(found, pair)) for pair in found.pairs],
            x_label="mean cosine to the teacher's state",
            caption="The further right, the nearer a student block's state is to that of the block it learns from.",
        )
    )
    if any(pair.before is None for pair in found.pairs):
        why = "Before projection there is nothing to compare: the widths differ, and nothing says which channels agree."
        blocks.append(Missing(why))
    return Section("projectors", title, [Figures(figures), *blocks])


def _spectrum(pairs: "list[ProjectedPair]") -> Any:
    step = -(-len(pairs) // len(LIGHT))
    chosen = pairs[::step]
    some = "" if step == 1 else f" Every {step}th pair is drawn."
    return spectrum_figure(
        "projector-spectrum",
        "Singular values of the projectors",
        {f"{pair.student} → {pair.teacher}": pair.singular_values or [] for pair in chosen},
        caption=f"A flat line keeps every direction of the student's state; one that falls keeps a few.{some}",
    )


def _cosines(found: "BlockSimilarity", pair: "ProjectedPair") -> dict[str, float]:
    values: dict[str, float] = {}
    if found.measure == "cosine":
        values["pruned student"] = found.pruned[pair.student][found.teacher_blocks.index(pair.teacher)]
    if pair.before is not None and pair.before != pair.after:
        values["recovered, before projection"] = pair.before
    is_projected = pair.before != pair.after
    values["recovered, after projection" if is_projected else "recovered student"] = pair.after
    return values
