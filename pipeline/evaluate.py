"""Judge models on the eval rows: loss, perplexity, KL to the teacher and agreement with it, exactly.

The teacher speaks from the store: its post-norm last states and its output head give its whole distribution back. Where
the recipe names tasks, all models answer these too, and there the teacher itself is run, once for all recipes.
Shapes: N positions that count, V vocabulary, D width.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cache.index import kept_entry, write_entry
from cache.reader import Reader
from cache.tokens import TOKENS
from pipeline.config import Recipe
from pipeline.forward import pad_rows
from pipeline.machine import check_device
from pipeline.models import check_vocabularies, identify, load_config, load_model, resolve_device
from pipeline.places import check_writable
from pipeline.provenance import write_record
from pipeline.run_index import RunRows, find_run_rows, trained_student
from pipeline.runs.model_card import update_card
from pipeline.student_forward import StudentForward
from pipeline.students.folders import find_student
from pipeline.targets.columns import EVAL_FORM, LABEL_LOGIT, LOSS_TEMPERATURE, final_name, logsumexp_name
from pipeline.targets.encodings import decode_state
from pipeline.targets.stored_head import load_head
from pipeline.task_scores import TaskAverage, TaskComparison, compare_on_tasks
from pipeline.tasks import load_tasks

_CHUNK_POSITIONS = 256
_DTYPE = "float32"
# Part of what a student's figures are kept by: a change of what is computed makes them stale.
_VERSION = 1


@dataclass(frozen=True)
class Quality:
    """A model on the eval rows, averaged over the positions that count.

    Attributes:
        loss: Cross entropy with the text, in nats a token.
        perplexity: exp(loss).
        kl: KL(teacher || model) over the whole vocabulary at temperature 1, in nats a token.
        agreement: Share of positions where model and teacher have the same likeliest token.
    """

    loss: float
    perplexity: float
    kl: float
    agreement: float


@dataclass(frozen=True)
class Evaluation:
    """The models of a run, side by side.

    Attributes:
        models: `teacher`, `pruned` and, once it is trained, `recovered`.
        gap_closed: By measure, (recovered - pruned) / (teacher - pruned); None where the pruned model has no gap.
        num_tokens: Positions that counted.
        tasks: The models on each of the recipe's tasks.
        task_average: Over the tasks where a higher value is better; None where there is none.
    """

    models: dict[str, Quality]
    gap_closed: dict[str, float | None]
    num_tokens: int
    tasks: dict[str, TaskComparison]
    task_average: TaskAverage | None


def evaluate(recipe: Recipe, *, show_progress: bool = True) -> Evaluation:
    """Evaluate the recipe's teacher, its student as it was and its student as it is trained.

    Raises:
        StoreError: `precompute` has not made the eval rows complete.
        ModelError: A student cannot be loaded, or a teacher that tasks are to be asked of.
        RecipeError: A task is unknown, or its questions cannot be loaded; or the device or the output is wrong.
    """
    check_device("evaluate.device", recipe.evaluate.device)
    check_writable("output", Path(recipe.output))
    tasks = load_tasks(recipe.evaluate) if recipe.evaluate.tasks else []
    run = find_run_rows(recipe)
    teacher = _StoredTeacher(run, resolve_device(recipe.evaluate.device), recipe.local_copy)
    folders = {"pruned": find_student(recipe)}
    trained = trained_student(recipe)
    if (trained / "config.json").is_file():
        folders["recovered"] = trained
    models = {"teacher": teacher.quality()}
    for name, folder in folders.items():
        models[name] = _quality_of(recipe, run, teacher, folder, name, show_progress=show_progress)
    compared, average = (
        compare_on_tasks(recipe, run, folders, tasks, show_progress=show_progress) if tasks else ({}, None)
    )
    result = Evaluation(models, _gap_closed(models), teacher.num_positions, compared, average)
    facts = {"store": run.store.name, "selection": run.selections["eval"].name, "evaluation": asdict(result)}
    write_record(Path(recipe.output) / "evaluation", recipe, facts)
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
        self.num_positions = sum(len(self._counted(index)) for index in range(len(self)))

    def __len__(self) -> int:
        return len(self._selection)

    def quality(self) -> Quality:
        """Judge the teacher by its own stored numbers: no logits are needed."""
        normaliser_name = logsumexp_name(LOSS_TEMPERATURE)
        reader = Reader(self._run.store, self._selection, [LABEL_LOGIT, normaliser_name], local_copy=self._local_copy)
        total = 0.0
        for index in range(len(self)):
            row, counted = reader.row(index), self._counted(index).numpy()
            label_logit = row[LABEL_LOGIT]["values"][counted].astype("float64")
            total += float((row[normaliser_name]["values"][counted].astype("float64") - label_logit).sum())
        return _quality(total, 0.0, self.num_positions, self.num_positions)

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
        first = max(int(self._selection.loss_starts[index]) - 1, 0)
        return torch.arange(first, int(self._selection.lengths[index]) - 1)


def _quality_of(
    recipe: Recipe, run: RunRows, teacher: _StoredTeacher, folder: Path, name: str, *, show_progress: bool
) -> Quality:
    """Judge a student, or read what was found of the same weights on the same rows: a sweep shares its pruned one."""
    config = load_config(folder, trust_remote_code=recipe.student.trust_remote_code)
    rows = {"store": run.store.name, "selection": run.selections["eval"].name}
    key = {"version": _VERSION, **rows, "student": identify(folder, config, dtype=_DTYPE)}
    if (kept := kept_entry(recipe.cache, "quality", key)) is not None:
        return Quality(**kept)
    quality = _judge(recipe, run, teacher, folder, name, show_progress=show_progress)
    write_entry(recipe.cache, "quality", key, asdict(quality))
    return quality


@torch.inference_mode()
def _judge(
    recipe: Recipe, run: RunRows, teacher: _StoredTeacher, folder: Path, name: str, *, show_progress: bool
) -> Quality:
    trust = recipe.student.trust_remote_code
    check_vocabularies(run.store.teacher["vocab_size"], load_config(folder, trust_remote_code=trust))
    model = load_model(folder, dtype=_DTYPE, trust_remote_code=trust).to(teacher.device)
    student = StudentForward(model)
    loss, kl, agreed = 0.0, 0.0, 0
    with tqdm(total=len(teacher), unit="row", desc=f"evaluate {name}", disable=not show_progress) as bar:
        for batch in teacher.batches(recipe.evaluate.batch_size):
            ids_BT, mask_BT = pad_rows([ids for ids, _, _ in batch], device=teacher.device)
            _, state_BTD, head = student(ids_BT, mask_BT.long(), [])
            for row, (ids, counted, teacher_state) in enumerate(batch):
                for positions in counted.split(_CHUNK_POSITIONS):
                    sums = _compare(
                        head(state_BTD[row, positions]),
                        teacher.head(teacher_state[positions].to(teacher.device)),
                        ids[positions + 1].to(teacher.device),
                    )
                    loss, kl, agreed = loss + sums[0], kl + sums[1], agreed + int(sums[2])
            bar.update(len(batch))
    return _quality(loss, kl, agreed, teacher.num_positions)


def _compare(logits_NV: Tensor, teacher_logits_NV: Tensor, next_tokens_N: Tensor) -> tuple[float, float, float]:
    """Give the sums over positions of cross entropy, KL(teacher || model) and agreement."""
    logprobs_NV = logits_NV.log_softmax(dim=-1)
    teacher_logprobs_NV = teacher_logits_NV.log_softmax(dim=-1)
    loss = F.nll_loss(logprobs_NV, next_tokens_N, reduction="sum")
    kl = F.kl_div(logprobs_NV, teacher_logprobs_NV, reduction="sum", log_target=True)
    agreed = (logprobs_NV.argmax(dim=-1) == teacher_logprobs_NV.argmax(dim=-1)).sum()
    return float(loss), float(kl), float(agreed)


def _quality(loss: float, kl: float, agreed: int, num_positions: int) -> Quality:
    mean = loss / num_positions
    # A loss beyond 700 nats overflows a float: such a model has no perplexity worth a number.
    perplexity = math.exp(mean) if mean < 700 else math.inf
    return Quality(loss=mean, perplexity=perplexity, kl=kl / num_positions, agreement=agreed / num_positions)


def _gap_closed(models: dict[str, Quality]) -> dict[str, float | None]:
    if "recovered" not in models:
        return {}
    values = {name: asdict(quality) for name, quality in models.items()}
    closed: dict[str, float | None] = {}
    for measure in values["teacher"]:
        gap = values["teacher"][measure] - values["pruned"][measure]
        closed[measure] = (values["recovered"][measure] - values["pruned"][measure]) / gap if gap else None
    return closed
