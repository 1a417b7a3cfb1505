"""Files and folders that appear whole or not at all."""

import contextlib
import glob
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from coldstill.cache.local_objects import sync_path
from coldstill.cache.processes import is_dead, process_token

_SUFFIX = ".partial"
_OLD = ".old"


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is never seen half-written."""
    with whole_file(path) as partial:
        partial.write_text(text)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a file to write, which takes its place when the `with` ends well."""
    sweep_siblings(path)
    partial = _partial(path)
    try:
        with disk_errors(partial):
            yield partial
        sync_path(partial)
        partial.replace(path)
        sync_path(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill, which takes its place when the `with` ends well; what was there before is replaced."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _restore_old(folder)
    sweep_siblings(folder)
    partial = _partial(folder)
    try:
        partial.mkdir()
        with disk_errors(partial):
            yield partial
        for file in [*partial.rglob("*"), partial]:
            sync_path(file)
        _replace_folder(folder, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what safetensors says of a full disk into the operating system's own error."""
    try:
        yield
    except SafetensorError as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
        raise


def _replace_folder(folder: Path, partial: Path) -> None:
    # Out of the way first: a rename replaces no folder that has files.
    old = folder.with_name(f".{folder.name}.{process_token()}{_OLD}{_SUFFIX}")
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    except BaseException as error:
        # Another process may have been faster, and made the same.
        is_there = isinstance(error, OSError) and folder.is_dir()
        if old.exists() and not folder.is_dir():
            old.rename(folder)
        if not is_there:
            raise
    sync_path(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sweep_siblings(path: Path) -> None:
    """Remove what processes that died left half-made of a file or folder."""
    for left in _left_by_the_dead(path):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)


def _restore_old(folder: Path) -> None:
    """Put back a folder that a process moved out of the way and died before it was replaced."""
    for left in _left_by_the_dead(folder):
        if left.name.endswith(f"{_OLD}{_SUFFIX}") and not folder.exists():
            left.rename(folder)


def _left_by_the_dead(path: Path) -> list[Path]:
    """List what dead processes left half-made of a file or folder."""
    siblings = path.parent.glob(f".{glob.escape(path.name)}.*{_SUFFIX}")
    return [left for left in siblings if is_dead(left.name.removeprefix(f".{path.name}.").partition(".")[0])]


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{process_token()}{_SUFFIX}")
