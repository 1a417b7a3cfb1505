"""Trees of files to compare, and the small recipe that makes them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny import text_data


def files_below(root: Path) -> dict[str, bytes]:
    """Give every file below a root: relative path -> bytes."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def lasting_files_below(root: Path) -> dict[str, bytes]:
    """Give every file below a root, but for when and by what command a student was made."""
    return lasting(files_below(root))


def lasting(files: dict[str, bytes]) -> dict[str, bytes]:
    """Leave out when and by what command a student was made: a student that is made again differs in these alone."""
    files = dict(files)
    for name in [name for name in files if name.endswith("/provenance.json")]:
        facts = json.loads(files[name])
        files[name] = json.dumps({key: facts[key] for key in facts if key not in ("written_at", "argv")}).encode()
    return files


def difference(got: dict[str, bytes], want: dict[str, bytes]) -> dict[str, list[str]]:
    """Name the files that are missing, too many or of other bytes; empty where there are none."""
    found = {
        "missing": sorted(want.keys() - got.keys()),
        "extra": sorted(got.keys() - want.keys()),
        "other bytes": sorted(name for name in got.keys() & want.keys() if got[name] != want[name]),
    }
    return {what: names for what, names in found.items() if names}


def small_recipe(
    folder: Path,
    teacher: Path,
    text: Sequence[str],
    *,
    train_rows: int = 6,
    eval_rows: int = 3,
    batch_size: int = 4,
    **sections: Any,
) -> dict[str, Any]:
    """Write a text into a folder, and give a recipe of few rows and columns over it; `sections` replace its own."""
    return {
        "output": str(folder / "run"),
        "cache": str(folder / "caches"),
        "teacher": {"path": str(teacher), "dtype": "float32", "batch_size": batch_size},
        "data": text_data(folder, text, train_rows=train_rows, eval_rows=eval_rows),
        "student": {"prune": {"layers": {"remove": 1, "method": "last"}, "reconstruct": False}},
        "targets": {
            "logits": {"kind": "topk", "k": 4, "temperatures": [1]},
            "hidden": {"blocks": [1], "encoding": "coded"},
        },
        "loss": {"alpha": 0.5, "beta": 0.5, "gamma": 0, "temperature": 1},
        **sections,
    }
