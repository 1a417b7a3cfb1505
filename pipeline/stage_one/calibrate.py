"""Fit the transform codes that a recipe's columns need, from a small sample of its train rows. Stage one only."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from coldstill.cache.manifest import Manifest
from coldstill.cache.store import CONSTANTS, Store
from coldstill.pipeline.models import ModelParts
from coldstill.pipeline.models.float32_blocks import float32_blocks
from coldstill.pipeline.models.machine import is_slow_on_cpu
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.rows.kept_rows import Rows
from coldstill.pipeline.runtime.errors import DataError
from coldstill.pipeline.stage_one.streamed_capture import capture_all
from coldstill.pipeline.targets.calibrations import write_calibration
from coldstill.pipeline.targets.captured import Captured, CaptureRequest, joined, union_of
from coldstill.pipeline.targets.target import TeacherTarget

# Many times the width of a small model; a basis of a few thousand dimensions asks for more than its own number.
_POSITIONS_PER_CHANNEL = 8
_FEWEST_POSITIONS = 8192


def missing_calibrations(manifest: Manifest, targets: Iterable[TeacherTarget]) -> dict[str, TeacherTarget]:
    """Map each calibration that targets need and the store lacks to one of these targets."""
    needed = {target.calibration: target for target in targets}
    return {name: target for name, target in needed.items() if name and (CONSTANTS, name) not in manifest}


def calibrate(
    store: Store,
    manifest: Manifest,
    teacher: Teacher,
    missing: Mapping[str, TeacherTarget],
    rows: Rows,
    *,
    show_progress: bool,
) -> None:
    """Fit and commit calibrations, from rows spread evenly over those that are given.

    Raises:
        DataError: The rows hold too few positions to say anything of the teacher's states.
    """
    parts = teacher.parts
    request = union_of(target.needs for target in missing.values())
    batch_size = teacher.section.batch_size
    captured = capture_sample(
        parts, rows.tokens, request, num_tokens=rows.num_tokens, batch_size=batch_size, show_progress=show_progress
    )
    parts.rest()
    num_words = sum(target.calibration_words(parts.output_head) for target in missing.values())
    is_shown = show_progress and num_words > 0
    with tqdm(total=num_words, unit="word", unit_scale=True, desc="calibrate, fit", disable=not is_shown) as bar:
        for name, target in missing.items():
            states_ND = target.calibration_states(captured)
            if len(states_ND) <= 2:
                raise DataError(f"{name} needs more than {len(states_ND)} positions of text: take more train rows")
            code = target.fit_code(states_ND, parts.output_head, on_words=bar.update)
            write_calibration(
                store, manifest, name, code, num_positions=len(states_ND), metric=target.calibration_metric
            )


def capture_sample(
    parts: ModelParts,
    rows: Sequence[np.ndarray],
    request: CaptureRequest,
    *,
    num_tokens: int,
    batch_size: int,
    show_progress: bool,
) -> Captured:
    """Run the teacher over some of the rows, and keep what is asked.

    On a CPU that is slow in the teacher's dtype its blocks run in float32: where the basis lies does not hang on how
    the states are rounded, and what is stored in it later is rounded as the teacher rounds it.
    """
    wanted = max(_FEWEST_POSITIONS, _POSITIONS_PER_CHANNEL * parts.hidden_size)
    chosen = spread_rows(rows, num_tokens, wanted)
    weight = next(parts.model.parameters())
    is_dense = not getattr(parts.model, "is_quantized", False)
    is_slow = is_dense and weight.device.type == "cpu" and is_slow_on_cpu(str(weight.dtype).removeprefix("torch."))
    batches = list(_batches(chosen, batch_size))
    num_tokens = sum(map(len, chosen))
    with (
        tqdm(total=num_tokens, unit="tok", unit_scale=True, desc="calibrate", disable=not show_progress) as bar,
        float32_blocks(parts.blocks) if is_slow else contextlib.nullcontext(),
    ):
        return joined(capture_all(parts, batches, request, on_tokens=bar.update))


def spread_rows(rows: Sequence[np.ndarray], num_tokens: int, num_positions: int) -> list[np.ndarray]:
    """Return rows spread evenly over all, which have so many tokens, with about so many positions."""
    mean_length = max(num_tokens / len(rows), 1.0)
    count = min(len(rows), max(1, round(num_positions / mean_length)))
    return [rows[index * len(rows) // count] for index in range(count)]


def _batches(rows: Sequence[np.ndarray], size: int) -> Iterable[tuple[list[Tensor], list[str]]]:
    for start in range(0, len(rows), size):
        batch = [torch.from_numpy(row.astype(np.int64)) for row in rows[start : start + size]]
        yield batch, [f"calibration row {start + index}" for index in range(len(batch))]
