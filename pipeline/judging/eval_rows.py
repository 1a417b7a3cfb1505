"""Models on the eval rows: cross entropy, KL to the teacher and agreement with it, exactly, summed over each row.

The teacher speaks from the store: its post-norm last states and its output head give its whole distribution back.
Shapes: B rows in a batch, T positions, N positions that count, V vocabulary, D width.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from coldstill.cache.index import kept_entry, write_entry
from coldstill.cache.reader import Reader
from coldstill.cache.tokens import TOKENS
from coldstill.pipeline.judging.qualities import RowSums
from coldstill.pipeline.models import check_vocabularies, identify, load_config, load_model
from coldstill.pipeline.models.forward import pad_rows
from coldstill.pipeline.models.student_forward import StudentForward
from coldstill.pipeline.outputs.run_index import RunRows
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.runtime.errors import NonFiniteError
from coldstill.pipeline.targets.stored_head import load_head
from coldstill.pipeline.targets.wanted import EVAL_LABEL, EVAL_NORMALISER, EVAL_STATE
from torch import Tensor
from tqdm import tqdm

_CHUNK_POSITIONS = 256
_DTYPE = "float32"
# Part of what a student's figures are kept by: a change of what is computed makes them stale. Version 1 kept the means
# alone, which say nothing of their errors; a student that it judged is judged once more.
_VERSION = 2


class StoredTeacher:
    """The teacher's distribution over the eval rows, rebuilt from the store."""

    def __init__(self, run: RunRows, device: torch.device, local_copy: str | None) -> None:
        self._run = run
        self._local_copy = local_copy
        self._selection = run.selections["eval"]
        self._reader = Reader(run.store, self._selection, [TOKENS, EVAL_STATE.name], local_copy=local_copy)
        self.head = load_head(run.store, device)
        self.device = device
        self.counts = [len(self._counted(index)) for index in range(len(self))]

    def __len__(self) -> int:
        return len(self._selection)

    def row_sums(self) -> RowSums:
        """Judge the teacher by its own stored numbers: no logits are needed."""
        names = [EVAL_LABEL.name, EVAL_NORMALISER.name]
        reader = Reader(self._run.store, self._selection, names, local_copy=self._local_copy)
        losses = []
        for index in range(len(self)):
            row, counted = reader.row(index), self._counted(index).numpy()
            label_logit = row[EVAL_LABEL.name]["values"][counted].astype("float64")
            losses.append(float((row[EVAL_NORMALISER.name]["values"][counted].astype("float64") - label_logit).sum()))
        return RowSums(losses, [0.0] * len(self), [float(count) for count in self.counts])

    def batches(self, size: int) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
        """Give rows in batches: token ids [T], positions that count [N], and the last states [T, D] of each row."""
        for start in range(0, len(self), size):
            batch = []
            for index in range(start, min(start + size, len(self))):
                row = self._reader.row(index)
                ids = torch.from_numpy(row[TOKENS]["ids"].astype("int64"))
                stored = {"values": torch.from_numpy(row[EVAL_STATE.name]["values"].copy())}
                state = EVAL_STATE.decode(stored)
                batch.append((ids, self._counted(index), state))
            yield batch

    def _counted(self, index: int) -> Tensor:
        """Give the positions of a row whose next token counts."""
        first = max(int(self._selection.loss_starts[index]) - 1, 0)
        return torch.arange(first, int(self._selection.lengths[index]) - 1)


def sums_of(
    recipe: Recipe, run: RunRows, teacher: StoredTeacher, folder: Path, name: str, *, show_progress: bool
) -> RowSums:
    """Judge a student, or read what was found of the same weights on the same rows: a sweep shares its pruned one."""
    config = load_config(folder, trust_remote_code=recipe.student.trust_remote_code)
    rows = {"store": run.store.name, "selection": run.selections["eval"].name}
    key = {"version": _VERSION, **rows, "student": identify(folder, config, dtype=_DTYPE)}
    if (kept := kept_entry(recipe.cache, "quality", key)) is not None:
        return RowSums(**kept)
    sums = _judge(recipe, run, teacher, folder, name, show_progress=show_progress)
    write_entry(recipe.cache, "quality", key, asdict(sums))
    return sums


@torch.inference_mode()
def _judge(
    recipe: Recipe, run: RunRows, teacher: StoredTeacher, folder: Path, name: str, *, show_progress: bool
) -> RowSums:
    trust = recipe.student.trust_remote_code
    check_vocabularies(run.store.teacher["vocab_size"], load_config(folder, trust_remote_code=trust))
    model = load_model(folder, dtype=_DTYPE, trust_remote_code=trust).to(teacher.device)
    student = StudentForward(model)
    found = RowSums([], [], [])
    with tqdm(total=len(teacher), unit="row", desc=f"evaluate {name}", disable=not show_progress) as bar:
        for batch in teacher.batches(recipe.evaluate.batch_size):
            ids_BT, mask_BT = pad_rows([ids for ids, _, _ in batch], device=teacher.device)
            _, state_BTD, head = student(ids_BT, mask_BT.long(), [])
            for row, (ids, counted, teacher_state) in enumerate(batch):
                sums = [
                    _compare(
                        head(state_BTD[row, positions]),
                        teacher.head(teacher_state[positions].to(teacher.device)),
                        ids[positions + 1].to(teacher.device),
                    )
                    for positions in counted.split(_CHUNK_POSITIONS)
                ]
                of_row = [sum(values) for values in zip(*sums, strict=True)]
                if not all(map(math.isfinite, of_row)):
                    raise NonFiniteError(
                        f"the {name} student in {folder} gives no finite numbers on eval row {len(found.loss)}: its "
                        "training has diverged, or its weights are damaged"
                    )
                for per_row, value in zip((found.loss, found.kl, found.agreement), of_row, strict=True):
                    per_row.append(value)
            bar.update(len(batch))
    return found


def _compare(logits_NV: Tensor, teacher_logits_NV: Tensor, next_tokens_N: Tensor) -> tuple[float, float, float]:
    """Give the sums over positions of cross entropy, KL(teacher || model) and agreement."""
    logprobs_NV = logits_NV.log_softmax(dim=-1)
    teacher_logprobs_NV = teacher_logits_NV.log_softmax(dim=-1)
    loss = F.nll_loss(logprobs_NV, next_tokens_N, reduction="sum")
    kl = F.kl_div(logprobs_NV, teacher_logprobs_NV, reduction="sum", log_target=True)
    agreed = (logprobs_NV.argmax(dim=-1) == teacher_logprobs_NV.argmax(dim=-1)).sum()
    return float(loss), float(kl), float(agreed)
