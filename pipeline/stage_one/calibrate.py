"""Fit the transform codes that a recipe's columns need, from a small sample of its train rows. Stage one only."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from coldstill.cache.manifest import Manifest
from coldstill.cache.store import CONSTANTS, Store
from coldstill.pipeline.models import ModelParts
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.runtime.errors import DataError
from coldstill.pipeline.stage_one.capture import capture
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
    store: Store, manifest: Manifest, teacher: Teacher, missing: Mapping[str, TeacherTarget], rows: Sequence[np.ndarray]
) -> None:
    """Fit and commit calibrations, from rows spread evenly over those that are given.

    Raises:
        DataError: The rows hold too few positions to say anything of the teacher's states.
    """
    parts = teacher.parts
    request = union_of(target.needs for target in missing.values())
    captured = capture_sample(parts, rows, request, batch_size=teacher.section.batch_size)
    for name, target in missing.items():
        states_ND = target.calibration_states(captured)
        if len(states_ND) <= 2:
            raise DataError(f"{name} needs more than {len(states_ND)} positions of text: take more train rows")
        code = target.fit_code(states_ND, parts.output_head)
        write_calibration(store, manifest, name, code, num_positions=len(states_ND), metric=target.calibration_metric)


def capture_sample(
    parts: ModelParts, rows: Sequence[np.ndarray], request: CaptureRequest, *, batch_size: int
) -> Captured:
    """Run the teacher over some of the rows, and keep what is asked."""
    wanted = max(_FEWEST_POSITIONS, _POSITIONS_PER_CHANNEL * parts.hidden_size)
    chosen = spread_rows(rows, wanted)
    return joined(
        [
            capture(parts, [torch.from_numpy(ids.astype(np.int64)) for ids in batch], request, row_names=names)
            for batch, names in _batches(chosen, batch_size)
        ]
    )


def spread_rows(rows: Sequence[np.ndarray], num_positions: int) -> list[np.ndarray]:
    """Return rows spread evenly over all, with about so many positions in all."""
    mean_length = max(sum(map(len, rows)) / len(rows), 1.0)
    count = min(len(rows), max(1, round(num_positions / mean_length)))
    return [rows[index * len(rows) // count] for index in range(count)]


def _batches(rows: Sequence[np.ndarray], size: int) -> Iterable[tuple[Sequence[np.ndarray], list[str]]]:
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        yield batch, [f"calibration row {start + index}" for index in range(len(batch))]
