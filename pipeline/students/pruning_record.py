"""The record beside a student of what was cut to make it, and what it was like before any training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PRUNING_FILE = "pruning.json"
_CHANNELS_FILE = "kept_channels.json"
_SIZES = {"blocks": "blocks", "heads": "attention heads", "mlp": "MLP width", "hidden": "hidden width"}


def read_pruning(folder: Path) -> dict[str, Any] | None:
    """Return what was cut of a student; None for one that was not made here."""
    record = folder / PRUNING_FILE
    return dict(json.loads(record.read_text())) if record.is_file() else None


def write_kept_channels(folder: Path, channels: Sequence[int]) -> None:
    """Write, beside a student, the teacher's channel of each of its own."""
    (folder / _CHANNELS_FILE).write_text(json.dumps(list(channels)) + "\n")


def read_kept_channels(folder: Path) -> list[int] | None:
    """Return the teacher's channel of each of a student's, None where nothing says so."""
    file = folder / _CHANNELS_FILE
    return list(json.loads(file.read_text())) if file.is_file() else None


def was_cut(pruning: Mapping[str, Any], size: str) -> bool:
    """Whether a student has less than its teacher of `blocks`, `heads`, `mlp` or `hidden`.

    A size that is not known, or that the record says nothing of, is whole.
    """
    sizes = pruning.get(size)
    return sizes is not None and bool(sizes["student"] != sizes["teacher"])


def is_narrower(pruning: Mapping[str, Any]) -> bool:
    """Whether a student's blocks have less of anything than its teacher's."""
    return any(was_cut(pruning, size) for size in _SIZES if size != "blocks")


def describe_cut(pruning: Mapping[str, Any]) -> str:
    """Say in a few words what was cut."""
    changed = [
        f"{words} {pruning[size]['teacher']:,} to {pruning[size]['student']:,}"
        for size, words in _SIZES.items()
        if was_cut(pruning, size)
    ]
    before, after = pruning["parameters"]["teacher"], pruning["parameters"]["student"]
    changed.append(f"parameters {before:,} to {after:,} ({after / before:.1%})")
    return ", ".join([*changed, *(["reconstructed"] if pruning.get("reconstructed") else [])])
