"""How a command ends: exit codes, one line for what is the user's to mend, a word of comfort when interrupted."""

import contextlib
import errno
import signal
import sys
from collections.abc import Iterator
from typing import Any

import typer

from cache.errors import ColdstillError

DAMAGED = 1
UNFINISHED = 1
USER_ERROR = 2
INTERRUPTED = 130
TERMINATED = 143

# What the operating system says when the user's disk, and not this program, is at fault.
_DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOTDIR,
    errno.EEXIST,
}


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what is the user's to mend into one line and exit code 2, and an interruption into a word of comfort."""
    previous = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        yield
    except ColdstillError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        _fail(f"{error.filename or 'disk'}: {error.strerror}; what was committed stays; run the command again to go on")
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        _fail(
            f"{str(error).partition('. ')[0]}; take smaller batches (teacher.batch_size, "
            "train.per_device_train_batch_size, evaluate.batch_size), or cpu as teacher.device or evaluate.device"
        )
    except _Terminated:
        _say_interrupted()
        raise typer.Exit(TERMINATED) from None
    except KeyboardInterrupt:
        _say_interrupted()
        raise typer.Exit(INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an accelerator had no memory left; torch is loaded where it raised that."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


class _Terminated(BaseException):
    """SIGTERM, as an exception, so that what is half-made is removed on the way out."""


def _raise_terminated(_signal: int, _frame: Any) -> None:
    raise _Terminated


def _end_progress() -> None:
    """Leave the line of a progress bar that an error cut off."""
    tqdm = sys.modules.get("tqdm")
    for bar in list(tqdm.tqdm._instances) if tqdm else []:
        bar.close()


def _say_interrupted() -> None:
    _end_progress()
    typer.echo("interrupted; what was committed stays, run the same command again to go on", err=True)


def _fail(message: str) -> None:
    _end_progress()
    typer.echo(f"coldstill: {message}", err=True)
    raise typer.Exit(USER_ERROR) from None
