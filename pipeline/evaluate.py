"""Judge models on the eval rows: loss, perplexity, KL to the teacher and agreement with it, exactly.

The teacher speaks from the store: its post-norm last states and its output head give its whole distribution back. A
position counts where the token that follows weighs more than 0, and then it counts once, whatever the weight. Where the
recipe names tasks, all models answer these too, and there the teacher itself is run, once for all recipes.
Shapes: N positions that count, V vocabulary, D width.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from coldstill.cache.errors import NonFiniteError
from coldstill.cache.index import kept_entry, write_entry
from coldstill.cache.reader import Reader
from coldstill.cache.spans import token_weights
from coldstill.cache.tokens import TOKENS
from coldstill.pipeline.judging.held_out import Quality, RowSums, differences, quality_of
from coldstill.pipeline.judging.results import write_evaluation
from coldstill.pipeline.judging.task_scores import TaskAverage, TaskComparison, compare_on_tasks
from coldstill.pipeline.judging.tasks import load_tasks
from coldstill.pipeline.models import check_vocabularies, identify, load_config, load_model, resolve_device
from coldstill.pipeline.models.forward import pad_rows
from coldstill.pipeline.models.machine import check_device
from coldstill.pipeline.models.student_forward import StudentForward
from coldstill.pipeline.outputs.places import check_writable
from coldstill.pipeline.outputs.retention import Estimate
from coldstill.pipeline.outputs.run_index import RunRows, find_run_rows, trained_student
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.runtime.interruptions import what_stays
from coldstill.pipeline.stage_two.model_card import update_card
from coldstill.pipeline.stage_two.run_folder import check_run, claimed_run, what_is_untrained
from coldstill.pipeline.students.folders import find_student
from coldstill.pipeline.targets.columns import EVAL_FORM, LABEL_LOGIT, LOSS_TEMPERATURE, final_name, logsumexp_name
from coldstill.pipeline.targets.encodings import decode_state
from coldstill.pipeline.targets.stored_head import load_head
from torch import Tensor
from tqdm import tqdm

_CHUNK_POSITIONS = 256
_DTYPE = "float32"
# Part of what a student's figures are kept by: a change of what is computed makes them stale. Version 1 kept the means
# alone, which say nothing of their errors; a student that it judged is judged once more.
_VERSION = 2


@dataclass(frozen=True)
class Evaluation:
    """The models of a run, side by side.

    Attributes:
        models: `teacher`, `pruned` and, once it is trained, `recovered`.
        gaps: By measure, how much worse the pruned student is than the teacher.
        gains: By measure, how much better the recovered student is than the pruned one; empty before training.
        gap_closed: By measure, (recovered - pruned) / (teacher - pruned); None where there is no gap.
        num_tokens: Positions that counted.
        num_rows: Eval rows, the draws that errors are estimated from.
        tasks: The models on each of the recipe's tasks.
        task_average: Over the tasks where a higher value is better; None where there is none.
        missing: Models that were not judged, and why; empty where all were.
    """

    models: dict[str, Quality]
    gaps: dict[str, Estimate]
    gains: dict[str, Estimate]
    gap_closed: dict[str, float | None]
    num_tokens: int
    num_rows: int
    tasks: dict[str, TaskComparison]
    task_average: TaskAverage | None
    missing: dict[str, str]


def evaluate(recipe: Recipe, *, show_progress: bool = True) -> Evaluation:
    """Evaluate the recipe's teacher, its student as it was and its student as it is trained.

    Raises:
        StoreError: `precompute` has not made the eval rows complete.
        ModelError: A student cannot be loaded, or a teacher that tasks are to be asked of.
        RecipeError: The output holds another recipe's run or cannot be written, the device is not there, or a task is
            unknown or its questions cannot be loaded.
    """
    check_device("evaluate.device", recipe.evaluate.device)
    check_writable("output", Path(recipe.output))
    check_run(recipe)
    judged: list[str] = []
    with what_stays(lambda: _what_stays(judged)):
        return _evaluate(recipe, judged, show_progress=show_progress)


def _what_stays(judged: Sequence[str]) -> str:
    if not judged:
        return "before a student was judged; the same command begins anew"
    return f"with {' and '.join(judged)} judged on the eval rows; run the same command again to go on"


def _evaluate(recipe: Recipe, judged: list[str], *, show_progress: bool) -> Evaluation:
    tasks = load_tasks(recipe.evaluate) if recipe.evaluate.tasks else []
    run = find_run_rows(recipe)
    teacher = _StoredTeacher(run, resolve_device(recipe.evaluate.device), recipe.local_copy)
    folders = {"pruned": find_student(recipe)}
    untrained = what_is_untrained(recipe)
    if untrained is None:
        folders["recovered"] = trained_student(recipe)
    sums = {"teacher": teacher.row_sums()}
    for name, folder in folders.items():
        sums[name] = _sums_of(recipe, run, teacher, folder, name, show_progress=show_progress)
        judged.append(name)
    compared, average = (
        compare_on_tasks(recipe, run, folders, tasks, show_progress=show_progress) if tasks else ({}, None)
    )
    found = differences(sums, teacher.counts)
    result = Evaluation(
        models={name: quality_of(of_rows, teacher.counts) for name, of_rows in sums.items()},
        gaps=found.gaps,
        gains=found.gains,
        gap_closed=found.gap_closed,
        num_tokens=sum(teacher.counts),
        num_rows=len(teacher),
        tasks=compared,
        task_average=average,
        missing={} if untrained is None else {"recovered": untrained},
    )
    facts = {"store": run.store.name, "selection": run.selections["eval"].name, "run": claimed_run(recipe)}
    write_evaluation(recipe, asdict(result), facts)
    if "recovered" in folders:
        update_card(recipe, run, folders["pruned"], asdict(result))
    return result


class _StoredTeacher:
    """The teacher's distribution over the eval rows, rebuilt from the store."""

    def __init__(self, run: RunRows, device: torch.device, local_copy: str | None) -> None:
        self._run = run
        self._local_copy = local_copy
        self._selection = run.selections["eval"]
        self._reader = Reader(run.store, self._selection, [TOKENS, final_name(EVAL_FORM)], local_copy=local_copy)
        self.head = load_head(run.store, device)
        self.device = device
        self.counts = [len(self._counted(index)) for index in range(len(self))]

    def __len__(self) -> int:
        return len(self._selection)

    def row_sums(self) -> RowSums:
        """Judge the teacher by its own stored numbers: no logits are needed."""
        normaliser_name = logsumexp_name(LOSS_TEMPERATURE)
        reader = Reader(self._run.store, self._selection, [LABEL_LOGIT, normaliser_name], local_copy=self._local_copy)
        losses = []
        for index in range(len(self)):
            row, counted = reader.row(index), self._counted(index).numpy()
            label_logit = row[LABEL_LOGIT]["values"][counted].astype("float64")
            losses.append(float((row[normaliser_name]["values"][counted].astype("float64") - label_logit).sum()))
        return RowSums(losses, [0.0] * len(self), [float(count) for count in self.counts])

    def batches(self, size: int) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
        """Give rows in batches: token ids [T], positions that count [N], and the last states [T, D] of each row."""
        for start in range(0, len(self), size):
            batch = []
            for index in range(start, min(start + size, len(self))):
                row = self._reader.row(index)
                ids = torch.from_numpy(row[TOKENS]["ids"].astype("int64"))
                stored = {"values": torch.from_numpy(row[final_name(EVAL_FORM)]["values"].copy())}
                state = decode_state(stored, form=EVAL_FORM)
                batch.append((ids, self._counted(index), state))
            yield batch

    def _counted(self, index: int) -> Tensor:
        """Give the positions of a row whose next token counts."""
        weights = token_weights(self._selection.spans[index], int(self._selection.lengths[index]))
        return torch.from_numpy(weights[1:] > 0).nonzero().squeeze(1)


def _sums_of(
    recipe: Recipe, run: RunRows, teacher: _StoredTeacher, folder: Path, name: str, *, show_progress: bool
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
    recipe: Recipe, run: RunRows, teacher: _StoredTeacher, folder: Path, name: str, *, show_progress: bool
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
