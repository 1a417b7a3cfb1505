"""Fit the transform codes that a recipe's columns need, from a small sample of its train rows. Stage one only."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from coldstill.cache.manifest import Manifest
from coldstill.cache.store import CONSTANTS, Store
from coldstill.pipeline.models import ModelParts
from coldstill.pipeline.models.teacher import Teacher
from coldstill.pipeline.runtime.errors import DataError
from coldstill.pipeline.stage_one.capture import CaptureRequest, capture
from coldstill.pipeline.targets.calibrations import write_calibration
from coldstill.pipeline.targets.columns import FINAL_PREFIX, calibration_name, hidden_block
from coldstill.pipeline.targets.encodings import ordinary_positions
from coldstill.pipeline.targets.transform_coding import TransformCode, fisher_information, fit_code
from torch import Tensor

# Many times the width of a small model; a basis of a few thousand dimensions asks for more than its own number.
_POSITIONS_PER_CHANNEL = 8
_FEWEST_POSITIONS = 8192


def missing_calibrations(manifest: Manifest, columns: Iterable[str]) -> dict[str, str]:
    """Map each calibration that columns need and the store lacks to one of these columns."""
    needed = {calibration_name(column): column for column in columns}
    return {name: column for name, column in needed.items() if name and (CONSTANTS, name) not in manifest}


def calibrate(
    store: Store, manifest: Manifest, teacher: Teacher, missing: dict[str, str], rows: Sequence[np.ndarray]
) -> None:
    """Fit and commit calibrations, from rows spread evenly over those that are given.

    Raises:
        DataError: The rows hold too few positions to say anything of the teacher's states.
    """
    parts = teacher.parts
    blocks = [hidden_block(column) for column in missing.values()]
    request = CaptureRequest(
        blocks=tuple(sorted({block for block in blocks if block is not None})), final_state=None in blocks
    )
    states = sample_states(parts, rows, request, batch_size=teacher.section.batch_size)
    for name, column in missing.items():
        block = hidden_block(column)
        state_ND = states[block]
        if len(state_ND) <= 2:
            raise DataError(f"{name} needs more than {len(state_ND)} positions of text: take more train rows")
        code = final_code(state_ND, parts) if column.startswith(FINAL_PREFIX) else hidden_code(state_ND)
        metric = "the output head's mean Fisher information" if block is None else "the mean squared error"
        write_calibration(store, manifest, name, code, num_positions=len(state_ND), metric=metric)


def sample_states(
    parts: ModelParts, rows: Sequence[np.ndarray], request: CaptureRequest, *, batch_size: int
) -> dict[int | None, Tensor]:
    """Run the teacher over some of the rows: each asked block's outputs, and the final state under None, [N, D]."""
    wanted = max(_FEWEST_POSITIONS, _POSITIONS_PER_CHANNEL * parts.hidden_size)
    chosen = spread_rows(rows, wanted)
    captured = [
        capture(parts, [torch.from_numpy(ids.astype(np.int64)) for ids in batch], request, row_names=names)
        for batch, names in _batches(chosen, batch_size)
    ]
    states: dict[int | None, Tensor] = {
        block: torch.cat([batch.hidden_ND[block] for batch in captured]) for block in request.blocks
    }
    finals = [batch.final_state_ND for batch in captured if batch.final_state_ND is not None]
    return {**states, **({None: torch.cat(finals)} if finals else {})}


def spread_rows(rows: Sequence[np.ndarray], num_positions: int) -> list[np.ndarray]:
    """Give rows spread evenly over all, with about so many positions in all."""
    mean_length = max(sum(map(len, rows)) / len(rows), 1.0)
    count = min(len(rows), max(1, round(num_positions / mean_length)))
    return [rows[index * len(rows) // count] for index in range(count)]


def final_code(state_ND: Tensor, parts: ModelParts) -> TransformCode:
    """Fit the code of the final state: what matters is the KL of the distributions that the output head makes."""
    metric_DD = fisher_information(state_ND, parts.output_head)
    return fit_code(state_ND.float().cpu(), metric_DD.cpu())


def hidden_code(state_ND: Tensor) -> TransformCode:
    """Fit the code of a block's outputs, in units of their spread: attention sinks set none of it."""
    ordinary_ND = state_ND[ordinary_positions(state_ND.float())].float().cpu()
    variance = float(ordinary_ND.var(dim=0, correction=0).mean())
    metric_DD = torch.eye(ordinary_ND.shape[1]) / max(variance, torch.finfo(torch.float32).tiny)
    return fit_code(ordinary_ND, metric_DD)


def _batches(rows: Sequence[np.ndarray], size: int) -> Iterable[tuple[Sequence[np.ndarray], list[str]]]:
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        yield batch, [f"calibration row {start + index}" for index in range(len(batch))]
