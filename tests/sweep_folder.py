"""A sweep's folder without its hours: one real run, copied under other names with other figures."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

VARIANTS: dict[str, dict[str, Any]] = {
    "task": {"loss.beta": 0, "loss.gamma": 0},
    "task+logits": {"loss.gamma": 0},
    "task+hidden": {"loss.beta": 0},
    "all": {},
    "all, mapped to the last blocks, T = 4": {"mapping.strategy": "last", "loss.temperature": 4},
    "no projector": {"projector.kind": "none"},
}
FAILED = "no projector"
ERROR = "projector.kind is none, but the student's width 16 is not the teacher's 32; use auto"
_TERMS_OF = {
    "task": ("loss_task",),
    "task+logits": ("loss_task", "loss_logits"),
    "task+hidden": ("loss_task", "loss_hidden"),
}


def write_sweep_folder(folder: Path, run: Path, *, seeds: tuple[int, ...] = (1, 2, 3)) -> None:
    """Write a sweep whose runs are a complete run's records, changed at random but always the same way."""
    runs, variants = {}, []
    for index, (name, changes) in enumerate(VARIANTS.items()):
        listed = []
        for seed in seeds:
            key = f"{index}{seed}ab"
            listed.append({"seed": seed, "key": key})
            # The last variant fails, and one seed of another is not there yet.
            status = "failed" if name == FAILED else "pending" if (name, seed) == ("all", seeds[-1]) else "complete"
            runs[key] = {"status": status, "error": ERROR if status == "failed" else None, "student": "students/4bd9"}
            recipe = folder / "recipes" / f"{key}.yaml"
            recipe.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(run / "student" / "recipe.yaml", recipe)
            if status == "complete":
                _write_run(folder / "runs" / key, run, name, quality=1.0 - 0.1 * index, seed=seed)
        variants.append({"name": name, "changes": changes, "runs": listed})
    precompute = {"computed_tokens": 5888, "written_bytes": 4_900_000, "seconds": 4.0, "students": []}
    state = {"format": 1, "name": "losses", "variants": variants, "runs": runs, "precompute": precompute}
    (folder / "sweep.json").write_text(json.dumps({**state, "process": None}))


def _write_run(folder: Path, run: Path, variant: str, *, quality: float, seed: int) -> None:
    drawn = random.Random(f"{variant}{seed}")
    shutil.copytree(run / "student", folder / "student")
    weights = load_file(folder / "student" / "model.safetensors")
    changed = {name: values * drawn.uniform(0.7, 1.3) for name, values in weights.items()}
    save_file(changed, folder / "student" / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(run / "projectors.safetensors", folder / "projectors.safetensors")
    train = json.loads((run / "train.json").read_text())
    train["summary"]["seconds"] *= drawn.uniform(0.9, 1.1)
    hidden = [
        term for term in ("loss_task", "loss_logits", "loss_hidden") if term not in _TERMS_OF.get(variant, (term,))
    ]
    for entry in train["log"]:
        for term in ("loss_task", "loss_logits", "loss_hidden"):
            if term in hidden:
                entry.pop(term, None)
            elif term in entry:
                entry[term] *= quality * drawn.uniform(0.95, 1.05)
    (folder / "train.json").write_text(json.dumps(train))
    shutil.copytree(run / "evaluation", folder / "evaluation")
    results = json.loads((run / "evaluation" / "results.json").read_text())
    models, noise = results["models"], drawn.uniform(0.94, 1.06)
    pruned = models["pruned"]
    share = quality * noise * 0.8
    models["recovered"] = {
        name: pruned[name] + (models["teacher"][name] - pruned[name]) * (1 - share) for name in pruned
    }
    results["gap_closed"] = dict.fromkeys(pruned, 1 - share)
    (folder / "evaluation" / "results.json").write_text(json.dumps(results))
