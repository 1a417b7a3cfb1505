"""What stage two keeps in a recipe's output folder: whose run it is, its checkpoints, its metrics, its student.

<output>/
    checkpoints/        the Trainer's, with the run's key in provenance.json
    student/            the trained student, a plain transformers model
    adapters/           of a student with LoRA: the adapters alone, as PEFT loads them
    projectors.safetensors  the trained projectors, where they are more than the identity
    train.json          summary, layer map and log; written last: it says that the run is complete
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME

from cache.errors import RecipeError
from cache.identity import digest_of
from pipeline.config import Recipe
from pipeline.provenance import PROVENANCE_FILE, RECIPE_FILE, write_record
from pipeline.recipe_file import load_recipe
from pipeline.run_index import RunRows, trained_student
from pipeline.runs.model_card import CARD_FILE
from pipeline.students.adapters import has_adapters, merged
from pipeline.trainer import PROJECTORS_FILE, UniversalDistillationTrainer
from pipeline.whole import whole_file, whole_folder, write_whole

_METRICS_FILE = "train.json"
_ADAPTERS = "adapters"

# Of a recipe, what decides the trained student. The data is in the selections' names.
_DECISIVE_SECTIONS = ("student", "targets", "mapping", "projector", "loss", "train")
# Of `train`, what changes nothing but what is seen and kept of it.
_IDLE_PREFIXES = (
    "logging_",
    "log_",
    "save_",
    "eval_",
    "dataloader_",
    "report_to",
    "run_name",
    "disable_tqdm",
)
# Of these, what decides which checkpoint is the best one.
_WHEN_JUDGED = ("eval_", "save_")


def folder_named(path: Path) -> Path:
    """Give the folder that somebody names: itself, or the output of a recipe."""
    return Path(load_recipe(path).output) if path.suffix in (".yaml", ".yml") and path.is_file() else path


def run_key(recipe: Recipe, run: RunRows) -> dict[str, Any]:
    """Give what decides the trained student, section by section, so that a difference can be named."""
    selections = {split: selection.name for split, selection in run.selections.items()}
    return {**decisive_sections(recipe), "store": run.store.name, "selections": selections}


def decisive_sections(recipe: Recipe) -> dict[str, Any]:
    """Give what of a recipe decides the trained student, but for its teacher and its rows."""
    # In JSON mode, so that it compares with the record that was read back from a file.
    sections = recipe.model_dump(mode="json", include=set(_DECISIVE_SECTIONS))
    sections["train"] = {key: value for key, value in recipe.train.items() if not _is_idle(key, recipe.train)}
    return sections


def _is_idle(key: str, train: Mapping[str, Any]) -> bool:
    """Whether a key of `train` changes nothing of the trained student."""
    if train.get("load_best_model_at_end") and key.startswith(_WHEN_JUDGED):
        return False
    return key.startswith(_IDLE_PREFIXES) and key != "dataloader_drop_last"


def claimed_run(recipe: Recipe) -> dict[str, Any] | None:
    """Give the key of the run that an output holds; None where it holds none."""
    record = checkpoints_folder(recipe) / PROVENANCE_FILE
    return dict(json.loads(record.read_text())["run"]) if record.is_file() else None


def different_sections(earlier: Mapping[str, Any], key: Mapping[str, Any]) -> list[str]:
    """Name what of a run's key is otherwise in an earlier one."""
    return [name for name in key if digest_of(earlier.get(name)) != digest_of(key[name])]


def checkpoints_folder(recipe: Recipe) -> Path:
    """Give the folder that the Trainer writes to."""
    return Path(recipe.output) / "checkpoints"


def claim(recipe: Recipe, key: Mapping[str, Any]) -> None:
    """Make the output this run's: no checkpoint is ever without the key of its run."""
    write_record(checkpoints_folder(recipe), recipe, {"run": key})


def check_claim(recipe: Recipe, key: Mapping[str, Any]) -> None:
    """Refuse an output that holds another recipe's run.

    Raises:
        RecipeError: It does; names the sections that differ.
    """
    earlier = claimed_run(recipe)
    if earlier is None:
        return
    different = different_sections(earlier, key)
    if different:
        raise RecipeError(
            f"{recipe.output} holds a run of another recipe ({', '.join(different)} differ; see "
            f"{checkpoints_folder(recipe) / RECIPE_FILE}); choose another output, or begin anew: "
            "coldstill train --restart"
        )


def finished_summary(recipe: Recipe) -> dict[str, Any] | None:
    """Give the summary of a run that is complete, None where it is not."""
    metrics = read_metrics(recipe)
    return None if metrics is None else dict(metrics["summary"])


def read_metrics(recipe: Recipe) -> dict[str, Any] | None:
    """Give what `write_metrics` wrote of a run that is complete, None where it is not."""
    metrics = Path(recipe.output) / _METRICS_FILE
    if not metrics.is_file() or not (trained_student(recipe) / "config.json").is_file():
        return None
    return dict(json.loads(metrics.read_text()))


def last_checkpoint(recipe: Recipe) -> tuple[int, str | None]:
    """Give step and folder of the newest checkpoint that is whole: its state file is published last."""
    folders = checkpoints_folder(recipe).glob("checkpoint-*")
    whole = [folder for folder in folders if _is_whole(folder)]
    by_step = {int(folder.name.rsplit("-", 1)[-1]): str(folder) for folder in whole}
    newest = max(by_step, default=0)
    return newest, by_step.get(newest)


def sweep_checkpoints(recipe: Recipe) -> None:
    """Remove checkpoints that a killed run did not finish."""
    for folder in checkpoints_folder(recipe).glob("checkpoint-*"):
        if not _is_whole(folder):
            shutil.rmtree(folder)


def _is_whole(checkpoint: Path) -> bool:
    return (checkpoint / TRAINER_STATE_NAME).is_file()


def export_student(
    trainer: UniversalDistillationTrainer,
    recipe: Recipe,
    state: dict[str, Tensor],
    facts: Mapping[str, Any],
    *,
    card: str,
) -> None:
    """Write the student alone, so that plain `from_pretrained` loads it; the folder appears whole.

    Adapters are merged into it; they are kept by themselves too.

    Args:
        trainer: It trained the student.
        recipe: Where to.
        state: The student's whole state.
        facts: What provenance says of it.
        card: Its model card.
    """
    student = trainer.accelerator.unwrap_model(trainer.model).student
    if has_adapters(student):
        with whole_folder(Path(recipe.output) / _ADAPTERS) as partial:
            student.save_pretrained(partial)
        student = merged(student)
        state = student.state_dict()
    with whole_folder(trained_student(recipe)) as partial:
        student.save_pretrained(partial, state_dict=state)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(partial)
        write_whole(partial / CARD_FILE, card)
        write_record(partial, recipe, facts)


def export_projectors(recipe: Recipe, state: dict[str, Tensor]) -> None:
    """Write the trained projectors by the student's block; none where all are the identity."""
    if state:
        with whole_file(Path(recipe.output) / PROJECTORS_FILE) as partial:
            save_file(state, partial)


def write_metrics(recipe: Recipe, record: Mapping[str, Any]) -> None:
    """Write the run's `summary`, `layer_map` and `log`, and so call it complete."""
    write_whole(Path(recipe.output) / _METRICS_FILE, json.dumps(dict(record), indent=1) + "\n")


def remove_run(recipe: Recipe) -> None:
    """Remove what an earlier run left, the word that it was complete first."""
    for name in (_METRICS_FILE, PROJECTORS_FILE):
        (Path(recipe.output) / name).unlink(missing_ok=True)
    for folder in (checkpoints_folder(recipe), trained_student(recipe), Path(recipe.output) / _ADAPTERS):
        shutil.rmtree(folder, ignore_errors=True)
