"""How alike student and teacher are, block by block, before and after training; the teacher speaks from the store.

A few eval rows run through the pruned and the trained student in float32, one model after the other, and every block's
output is held against the stored outputs of the teacher's blocks. The result is kept beside the evaluation, with a key
of what it was computed from, so that it is computed once.
Shapes: B rows, T positions, N positions that count, Ds and Dt widths of student and teacher.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from coldstill.cache.errors import IncompleteError, StoreError, StoreNotFoundError
from coldstill.cache.identity import digest_of
from coldstill.pipeline.judging.similarity_measures import cka_matrix, cosine_matrix, mean_cosine
from coldstill.pipeline.models import (
    find_structure,
    kept_channels_of,
    load_config,
    load_model,
    resolve_device,
    rope_switches,
    text_config,
)
from coldstill.pipeline.models.forward import model_inputs, run_body
from coldstill.pipeline.models.identity import weights_digest
from coldstill.pipeline.models.labels import counts_of
from coldstill.pipeline.models.machine import check_device
from coldstill.pipeline.models.projectors import create_projectors
from coldstill.pipeline.outputs.provenance import PROVENANCE_FILE
from coldstill.pipeline.outputs.run_index import RunRows, find_run_rows, trained_student
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.runtime.errors import ModelError
from coldstill.pipeline.runtime.whole import write_whole
from coldstill.pipeline.stage_two.checkpoint_parts import PROJECTORS_FILE
from coldstill.pipeline.stage_two.run_folder import check_run
from coldstill.pipeline.stage_two.target_sources import StoredTargets
from coldstill.pipeline.students.folders import find_student
from coldstill.pipeline.students.pruning_record import read_kept_channels
from coldstill.pipeline.targets.wanted import block_output

SIMILARITY_FILE = "similarity.json"
# Part of the key: a change of what is computed makes what was kept stale.
_VERSION = 1
_DIGITS = 6


@dataclass(frozen=True)
class ProjectedPair:
    """A mapped pair of the trained student.

    Attributes:
        student: The student's block.
        teacher: The teacher's.
        singular_values: Of the projector, the largest first; None where it is not one linear map.
        before: Mean cosine of the student's state and the teacher's same channels; None where nobody knows which these
            are.
        after: Mean cosine of the projected state and the teacher's.
    """

    student: int
    teacher: int
    singular_values: list[float] | None
    before: float | None
    after: float


@dataclass(frozen=True)
class BlockSimilarity:
    """Student blocks against stored teacher blocks.

    Attributes:
        measure: `cosine`, averaged over positions, or `cka` where the widths differ and no channels correspond.
        teacher_blocks: The stored ones.
        pruned: For each block of the student as it was, its likeness to each of these.
        recovered: The same of the trained student.
        pairs: The mapped pairs of which the teacher's block is stored.
        num_rows: Eval rows.
        num_positions: Their positions that count; the first of a row, which most models use as an attention sink, does
            not.
    """

    measure: str
    teacher_blocks: list[int]
    pruned: list[list[float]]
    recovered: list[list[float]]
    pairs: list[ProjectedPair]
    num_rows: int
    num_positions: int


def block_similarity(
    recipe: Recipe,
    layer_map: Mapping[int, int],
    *,
    num_rows: int = 4,
    label: str = "similarity",
    show_progress: bool = True,
) -> BlockSimilarity:
    """Compare the recipe's students with its teacher over the first eval rows, or read what was found before.

    Args:
        recipe: The recipe.
        layer_map: Student block to teacher block, as the student was trained.
        num_rows: How many eval rows.
        label: What the progress bar calls it.
        show_progress: Whether to show a progress bar.

    Raises:
        RecipeError: The recipe's output holds another recipe's run.
        StoreError: The store is gone or has no teacher block for the eval rows, or the pruned student is gone.
        ModelError: A student cannot be loaded.
    """
    check_run(recipe)
    facts = {"version": _VERSION, "num_rows": num_rows, **_student_facts(recipe)}
    file = Path(recipe.output) / "evaluation" / SIMILARITY_FILE
    kept = _read(file)
    try:
        run = find_run_rows(recipe)
        source = _stored_blocks(recipe, run)
    except StoreError:
        # What was found of these very students stays true when the store is gone.
        if kept is not None and {name: kept["key"].get(name) for name in facts} == facts:
            return _parse(kept["similarity"])
        raise
    key = {**facts, "columns": sorted(source.columns.hidden.values())}
    if kept is not None and kept["key"] == key:
        return _parse(kept["similarity"])
    students = {"pruned": find_student(recipe), "recovered": trained_student(recipe)}
    with tqdm(students.items(), unit="model", desc=label, disable=not show_progress) as bar:
        found = _compare(recipe, source, layer_map, num_rows, bar)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps({"key": key, "similarity": _rounded(asdict(found))}, indent=1) + "\n")
    return _parse(_rounded(asdict(found)))


def _student_facts(recipe: Recipe) -> dict[str, str]:
    """Say which students these are: the run that made the trained one, and its weights."""
    folder = trained_student(recipe)
    try:
        run = json.loads((folder / PROVENANCE_FILE).read_text())["run"]
    except FileNotFoundError:
        raise ModelError(f"no trained student in {folder}; run: coldstill train") from None
    return {"run": digest_of(run), "student": weights_digest(folder)}


def _stored_blocks(recipe: Recipe, run: RunRows) -> StoredTargets:
    """Return the outputs of teacher blocks that all eval rows have in the recipe's form."""
    source = StoredTargets.of_all_blocks(recipe, run, split="eval")
    if not source.columns.hidden:
        form = block_output(recipe.targets.hidden, 0).form
        raise IncompleteError(
            f"store {run.store.path} has no block outputs of the eval rows in {form}; name blocks in "
            "targets.hidden.blocks, and run: coldstill precompute"
        )
    return source


@dataclass(frozen=True)
class _Rows:
    """Some eval rows: token ids, which of their positions count, and the teacher's states there, [N, Dt] a block."""

    ids_BT: Tensor
    mask_BT: Tensor | None
    counts_BT: Tensor
    teacher: dict[int, Tensor]


def _compare(
    recipe: Recipe,
    source: StoredTargets,
    layer_map: Mapping[int, int],
    num_rows: int,
    students: Iterable[tuple[str, Path]],
) -> BlockSimilarity:
    rows = _read_rows(source, num_rows)
    matrices: dict[str, list[list[float]]] = {}
    pairs: list[ProjectedPair] = []
    channels: Any = None
    for name, folder in students:
        if name == "pruned":  # training leaves the stream's channels what they were
            channels = _teacher_channels(recipe, folder, source.run.store.teacher["hidden_size"])
        states = _student_states(recipe, folder, rows)
        if channels is None:
            matrices[name] = cka_matrix(states, rows.teacher)
        else:
            teacher = {block: states_ND[:, channels] for block, states_ND in rows.teacher.items()}
            matrices[name] = cosine_matrix(states, teacher)
        if name == "recovered":
            pairs = _pairs(recipe, layer_map, states, rows.teacher, channels)
    return BlockSimilarity(
        measure="cka" if channels is None else "cosine",
        teacher_blocks=list(source.columns.hidden),
        **matrices,
        pairs=pairs,
        num_rows=len(rows.ids_BT),
        num_positions=int(rows.counts_BT.sum()),
    )


def _read_rows(source: StoredTargets, num_rows: int) -> _Rows:
    batch = source.first_rows("eval", num_rows)
    counts_BT = counts_of(batch)
    counts_BT[:, 0] = False
    teacher, chosen_BT = source.states(batch, counts_BT)
    return _Rows(batch["input_ids"], batch.get("attention_mask"), chosen_BT, teacher)


@torch.inference_mode()
def _student_states(recipe: Recipe, folder: Path, rows: _Rows) -> dict[int, Tensor]:
    """Return the output [N, Ds] of every block of a student, where positions count."""
    check_device("evaluate.device", recipe.evaluate.device)
    device = resolve_device(recipe.evaluate.device)
    model = load_model(folder, dtype="float32", trust_remote_code=recipe.student.trust_remote_code).to(device)
    structure = find_structure(model)
    blocks, body = model.get_submodule(structure.blocks_name), model.get_submodule(structure.body_name)
    assert isinstance(blocks, nn.ModuleList)
    mask_BT = None if rows.mask_BT is None else rows.mask_BT.to(device)
    inputs, switches = model_inputs(rows.ids_BT.to(device), mask_BT), rope_switches(model.config)
    outputs, _ = run_body(body, blocks, inputs, range(len(blocks)), switches=switches)
    return {block: outputs[block].float().cpu()[rows.counts_BT] for block in sorted(outputs)}


def _teacher_channels(recipe: Recipe, folder: Path, teacher_width: int) -> Any:
    """Return which of the teacher's channels a student's are: all, those that were kept of them, or None: unknown."""
    config = load_config(folder, trust_remote_code=recipe.student.trust_remote_code)
    if int(text_config(config).hidden_size) == teacher_width:
        return slice(None)
    # Students that were pruned before these had a file have them in the config.
    kept = read_kept_channels(folder) or kept_channels_of(config)
    return None if kept is None else torch.tensor(kept)


@torch.inference_mode()
def _pairs(
    recipe: Recipe, layer_map: Mapping[int, int], student: dict[int, Tensor], teacher: dict[int, Tensor], channels: Any
) -> list[ProjectedPair]:
    stored = {own: other for own, other in layer_map.items() if other in teacher}
    if not stored:
        return []
    projectors = _load_projectors(recipe, layer_map, student, teacher)
    found = []
    for own, other in stored.items():
        student_ND, teacher_ND, projector = student[own], teacher[other], projectors[str(own)]
        linear = getattr(projector, "linear", None)
        found.append(
            ProjectedPair(
                student=own,
                teacher=other,
                singular_values=None if linear is None else torch.linalg.svdvals(linear.weight).tolist(),
                before=None if channels is None else mean_cosine(student_ND, teacher_ND[:, channels]),
                after=mean_cosine(projector(student_ND), teacher_ND),
            )
        )
    return found


def _load_projectors(
    recipe: Recipe, layer_map: Mapping[int, int], student: dict[int, Tensor], teacher: dict[int, Tensor]
) -> nn.ModuleDict:
    widths = (next(iter(states.values())).shape[1] for states in (student, teacher))
    projectors = create_projectors(
        layer_map, student_dim=next(widths), teacher_dim=next(widths), kind=recipe.projector.kind
    )
    if projectors.state_dict():
        file = Path(recipe.output) / PROJECTORS_FILE
        if not file.is_file():
            raise StoreNotFoundError(f"the projectors of the run are gone: no {file}; run: coldstill train --restart")
        state = load_file(file)
        projectors.load_state_dict({name.removeprefix("projectors."): values for name, values in state.items()})
    return projectors


def _read(file: Path) -> dict[str, Any] | None:
    try:
        kept: dict[str, Any] = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return kept


def _parse(kept: Mapping[str, Any]) -> BlockSimilarity:
    return BlockSimilarity(**{**kept, "pairs": [ProjectedPair(**pair) for pair in kept["pairs"]]})


def _rounded(value: Any) -> Any:
    """Round every float, so that the last bits of a sum do not make another file."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
