"""What stage two keeps in a recipe's output folder: whose run it is, its checkpoints, its metrics, its student.

<output>/
    checkpoints/        the Trainer's, with the run's key in provenance.json
    student/            the trained student, a plain transformers model
    adapters/           of a student with LoRA: the adapters alone, as PEFT loads them
    projectors.safetensors  the trained projectors, where they are more than the identity
    train.json          summary, layer map and log; written last: it says that the run is complete
"""

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from coldstill.cache.errors import StoreError
from coldstill.cache.identity import digest_of
from coldstill.pipeline.outputs.provenance import PROVENANCE_FILE, RECIPE_FILE, write_record
from coldstill.pipeline.outputs.run_index import RunRows, find_run_rows, rows_key, trained_student
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.runtime.errors import RecipeError
from coldstill.pipeline.runtime.whole import whole_file, whole_folder, write_whole
from coldstill.pipeline.stage_two.checkpoint_parts import PROJECTORS_FILE
from coldstill.pipeline.stage_two.distillation_trainer import UniversalDistillationTrainer
from coldstill.pipeline.stage_two.model_card import CARD_FILE
from coldstill.pipeline.stage_two.resumable_trainer import newest_checkpoint, planned_steps
from coldstill.pipeline.students.adapters import has_adapters, merged
from coldstill.pipeline.students.folders import find_student
from coldstill.pipeline.students.pruning_record import read_kept_channels, write_kept_channels

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
    """Return the folder that somebody names: itself, or the output of a recipe.

    Raises:
        RecipeError: The recipe's output holds a run of another recipe.
    """
    path = path.expanduser()
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return path
    recipe = load_recipe(path)
    check_run(recipe)
    return Path(recipe.output)


def run_key(recipe: Recipe, run: RunRows) -> dict[str, Any]:
    """Return what decides the trained student, section by section, so that a difference can be named."""
    selections = {split: selection.name for split, selection in run.selections.items()}
    return {**decisive_sections(recipe), "store": run.store.name, "selections": selections}


def decisive_sections(recipe: Recipe) -> dict[str, Any]:
    """Return what of a recipe decides the trained student, but for its teacher and its rows."""
    said = recipe.identity()
    sections = {name: said[name] for name in _DECISIVE_SECTIONS}
    sections["train"] = {key: value for key, value in recipe.training.items() if not _is_idle(key, recipe.train)}
    return sections


def _is_idle(key: str, train: Mapping[str, Any]) -> bool:
    """Whether a key of `train` changes nothing of the trained student."""
    if key == "keep":
        return train["keep"] == "last"  # as it is without the key
    if train.get("keep") == "best" and key.startswith("eval_"):
        return False
    if train.get("load_best_model_at_end") and key.startswith(_WHEN_JUDGED):
        return False
    return key.startswith(_IDLE_PREFIXES) and key != "dataloader_drop_last"


def claimed_run(recipe: Recipe) -> dict[str, Any] | None:
    """Return the key of the run that an output holds; None where it holds none.

    Where somebody removed the checkpoints, which a trained student does without, the student says whose it is.
    """
    record = _claim_record(recipe)
    return None if record is None else dict(json.loads(record.read_text())["run"])


def _claim_record(recipe: Recipe) -> Path | None:
    records = [folder / PROVENANCE_FILE for folder in (checkpoints_folder(recipe), trained_student(recipe))]
    return next((record for record in records if record.is_file()), None)


def different_sections(earlier: Mapping[str, Any], key: Mapping[str, Any]) -> list[str]:
    """Name what of a run's key is otherwise in an earlier one."""
    return [name for name in key if digest_of(earlier.get(name)) != digest_of(key[name])]


def checkpoints_folder(recipe: Recipe) -> Path:
    """Return the folder that the Trainer writes to."""
    return Path(recipe.output) / "checkpoints"


def claim(recipe: Recipe, key: Mapping[str, Any]) -> None:
    """Make the output this run's: no checkpoint is ever without the key of its run."""
    write_record(checkpoints_folder(recipe), recipe, {"run": key})


def check_run(recipe: Recipe) -> None:
    """Refuse a recipe that did not train the run in its output, whether its store is there or gone.

    Raises:
        RecipeError: The output holds another recipe's run; names the sections that differ.
    """
    try:
        key = run_key(recipe, find_run_rows(recipe))
    except StoreError:
        # What the rows are is not known; what they are made of is.
        key = {**decisive_sections(recipe), **rows_key(recipe)}
    check_claim(recipe, key)


def check_claim(recipe: Recipe, key: Mapping[str, Any]) -> None:
    """Refuse an output that holds another recipe's run.

    Args:
        recipe: Whose output it is.
        key: What `run_key` gives of the recipe, or a part of it.

    Raises:
        RecipeError: It does; names the sections that differ.
    """
    record, claimed = _claim_record(recipe), claimed_run(recipe)
    if record is None or claimed is None:
        return
    recorded = record.with_name(RECIPE_FILE)
    with contextlib.suppress(RecipeError):
        # As this version reads it, which may know keys that were not there when the run was claimed.
        earlier = load_recipe(recorded)
        claimed |= {**decisive_sections(earlier), **rows_key(earlier)}
    different = different_sections(claimed, key)
    if different:
        raise RecipeError(
            f"{recipe.output} holds a run of another recipe ({', '.join(different)} differ; see {recorded}); give the "
            "recipe and the changes that made it, choose another output, or begin anew: coldstill train --restart"
        )


def what_is_untrained(recipe: Recipe) -> str | None:
    """Say why an output holds no trained student, and what to do; None where it holds one."""
    if (trained_student(recipe) / "config.json").is_file():
        return None
    step, checkpoint = newest_checkpoint(checkpoints_folder(recipe))
    if checkpoint is None:
        begun = "training has saved no checkpoint yet" if claimed_run(recipe) else "it is not trained yet"
        return f"{begun}; run: coldstill train"
    planned = planned_steps(Path(checkpoint))
    return f"training is at step {step} of {planned}; run: coldstill train"


def finished_summary(recipe: Recipe) -> dict[str, Any] | None:
    """Return the summary of a run that is complete, None where it is not."""
    metrics = read_metrics(recipe)
    return None if metrics is None else dict(metrics["summary"])


def read_metrics(recipe: Recipe) -> dict[str, Any] | None:
    """Return what `write_metrics` wrote of a run that is complete, None where it is not."""
    metrics = Path(recipe.output) / _METRICS_FILE
    student = trained_student(recipe)
    if not metrics.is_file() or not (student / "config.json").is_file() or not any(student.glob("*.safetensors")):
        return None
    return dict(json.loads(metrics.read_text()))


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
        if (channels := read_kept_channels(find_student(recipe))) is not None:
            write_kept_channels(partial, channels)
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
