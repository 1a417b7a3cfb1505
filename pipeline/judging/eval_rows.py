"""Models on the eval rows: cross entropy, KL to the teacher and agreement with it, exactly, summed over each row.

What the teacher says of them comes from a source: its post-norm last states and its output head give its whole
distribution. A position counts where the token that follows weighs more than 0, and then once, whatever the weight.
Shapes: B rows in a batch, T positions, N positions that count, V vocabulary, D width.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import Tensor
from tqdm import tqdm

from coldstill.cache.index import kept_entry, write_entry
from coldstill.pipeline.judging.qualities import RowSums
from coldstill.pipeline.losses.logits_targets import FullDistribution
from coldstill.pipeline.models import check_vocabularies, identify, load_config, load_model
from coldstill.pipeline.models.counted import places_of
from coldstill.pipeline.models.labels import counts_of
from coldstill.pipeline.models.student_forward import StudentForward
from coldstill.pipeline.outputs.run_index import RunRows
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.runtime.errors import NonFiniteError
from coldstill.pipeline.stage_two.target_sources import RowSource
from coldstill.pipeline.targets.forms import LABEL, NORMALISER

_CHUNK_POSITIONS = 256
_DTYPE = "float32"
# Part of what a student's figures are kept by: a change of what is computed makes them stale. Version 1 kept the means
# alone, which say nothing of their errors; a student that it judged is judged once more.
_VERSION = 2


@dataclass(frozen=True)
class _Batch:
    """Some eval rows: token ids, the mask of real ones, and the teacher's distribution where positions count."""

    ids_BT: Tensor
    mask_BT: Tensor
    counts_BT: Tensor
    teacher: FullDistribution

    def rows(self) -> Iterator[tuple[int, Tensor, int]]:
        """Yield each row, its positions that count, and where the first of them is among those of the batch."""
        first = 0
        for row, counts_T in enumerate(self.counts_BT):
            positions_N = counts_T.nonzero().squeeze(1)
            yield row, positions_N, first
            first += len(positions_N)


class EvalRows:
    """The eval rows, and what the teacher says of them.

    Args:
        source: Of the teacher's distribution, at temperature 1.
        numbers: Of the label's logits and the normalisers, by which the teacher is judged itself.
        device: Where models are judged.
    """

    def __init__(self, source: RowSource, numbers: RowSource, device: torch.device) -> None:
        self._source = source
        self._numbers = numbers
        self.device = device
        self.counts: list[int] = []
        self.teacher = self._judge_teacher()

    def __len__(self) -> int:
        return len(self.counts)

    def batches(self, size: int) -> Iterator[_Batch]:
        """Yield the rows in batches."""
        for batch in _read(self._source, size, self.device):
            counts_BT = counts_of(batch)
            form = self._source.forms.logits
            assert form is not None, "the source reads the distribution"
            with torch.no_grad():
                teacher = form.read(self._source(batch)["logits"], places_of(counts_BT), 1.0)
            assert isinstance(teacher, FullDistribution), "eval rows keep the last state"
            ids_BT = batch["input_ids"]
            yield _Batch(ids_BT, batch.get("attention_mask", torch.ones_like(ids_BT)), counts_BT, teacher)

    def _judge_teacher(self) -> RowSums:
        """Judge the teacher by its own numbers: no logits of all tokens are needed."""
        losses: list[float] = []
        for batch in _read(self._numbers, 1, self.device):
            counts_BT = counts_of(batch)
            given = self._numbers(batch)["logits"]
            label_logit_N, normaliser_N = (
                given[role]["values"][counts_BT].double().cpu().numpy() for role in (LABEL, NORMALISER)
            )
            losses.append(float((normaliser_N - label_logit_N).sum()))
            self.counts.append(int(counts_BT.sum()))
        return RowSums(losses, [0.0] * len(losses), [float(count) for count in self.counts])


def sums_of(recipe: Recipe, run: RunRows, rows: EvalRows, folder: Path, name: str, *, show_progress: bool) -> RowSums:
    """Judge a student, or read what was found of the same weights on the same rows: a sweep shares its pruned one."""
    config = load_config(folder, trust_remote_code=recipe.student.trust_remote_code)
    which = {"store": run.store.name, "selection": run.selections["eval"].name}
    key = {"version": _VERSION, **which, "student": identify(folder, config, dtype=_DTYPE)}
    if (kept := kept_entry(recipe.cache, "quality", key)) is not None:
        return RowSums(**kept)
    check_vocabularies(run.store.teacher["vocab_size"], config)
    sums = _judge(recipe, rows, folder, name, show_progress=show_progress)
    write_entry(recipe.cache, "quality", key, asdict(sums))
    return sums


@torch.inference_mode()
def _judge(recipe: Recipe, rows: EvalRows, folder: Path, name: str, *, show_progress: bool) -> RowSums:
    trust = recipe.student.trust_remote_code
    student = StudentForward(load_model(folder, dtype=_DTYPE, trust_remote_code=trust).to(rows.device))
    found = RowSums([], [], [])
    with tqdm(total=len(rows), unit="row", desc=f"evaluate {name}", disable=not show_progress) as bar:
        for batch in rows.batches(recipe.evaluate.batch_size):
            _, state_BTD, head = student(batch.ids_BT, batch.mask_BT, [])
            for row, positions_N, first in batch.rows():
                sums = [(0.0, 0.0, 0.0)]
                for start in range(0, len(positions_N), _CHUNK_POSITIONS):
                    chosen = positions_N[start : start + _CHUNK_POSITIONS]
                    place = slice(first + start, first + start + len(chosen))
                    logits_NV, teacher_NV = head(state_BTD[row, chosen]), batch.teacher.logits(place)
                    sums.append(_compare(logits_NV, teacher_NV, batch.ids_BT[row, chosen + 1]))
                of_row = [sum(values) for values in zip(*sums, strict=True)]
                if not all(map(math.isfinite, of_row)):
                    raise NonFiniteError(
                        f"the {name} student in {folder} gives no finite numbers on eval row {len(found.loss)}: its "
                        "training has diverged, or its weights are damaged"
                    )
                for per_row, value in zip((found.loss, found.kl, found.agreement), of_row, strict=True):
                    per_row.append(value)
            bar.update(len(batch.ids_BT))
    return found


def _compare(logits_NV: Tensor, teacher_logits_NV: Tensor, next_tokens_N: Tensor) -> tuple[float, float, float]:
    """Return the sums over positions of cross entropy, KL(teacher || model) and agreement."""
    logprobs_NV = logits_NV.log_softmax(dim=-1)
    teacher_logprobs_NV = teacher_logits_NV.log_softmax(dim=-1)
    loss = F.nll_loss(logprobs_NV, next_tokens_N, reduction="sum")
    kl = F.kl_div(logprobs_NV, teacher_logprobs_NV, reduction="sum", log_target=True)
    agreed = (logprobs_NV.argmax(dim=-1) == teacher_logprobs_NV.argmax(dim=-1)).sum()
    return float(loss), float(kl), float(agreed)


def _read(source: RowSource, size: int, device: torch.device) -> Iterator[dict[str, Any]]:
    rows = source.rows("eval")
    for start in range(0, len(rows), size):
        batch = source.collator(rows.__getitems__(range(start, min(start + size, len(rows)))))
        yield {name: send_to_device(values, device) for name, values in batch.items()}
