"""How a command ends: exit codes, one line for what is the user's to mend, what stays where it was interrupted."""

import contextlib
import errno
import signal
import sys
from collections.abc import Iterator

import typer

from coldstill.cache.errors import ColdstillError
from coldstill.pipeline.runtime.interruptions import Terminated, raise_terminated, what_stayed
from coldstill.pipeline.runtime.out_of_memory import is_out_of_memory, out_of_memory_line

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
    """Turn what is the user's to mend into one line and exit code 2, and an interruption into one on what stays."""
    previous = signal.signal(signal.SIGTERM, raise_terminated)
    try:
        yield
    except ColdstillError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        stays = what_stayed(error)
        _fail(f"{error.filename or 'disk'}: {error.strerror}" + (f", {stays}" if stays else ""))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _fail(out_of_memory_line(error))
    except Terminated as error:
        _say_interrupted(error)
        raise typer.Exit(TERMINATED) from None
    except KeyboardInterrupt as error:
        _say_interrupted(error)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


def _end_progress() -> None:
    """Leave the line of a progress bar that an error cut off."""
    tqdm = sys.modules.get("tqdm")
    for bar in list(tqdm.tqdm._instances) if tqdm else []:
        bar.close()


def _say_interrupted(error: BaseException) -> None:
    _end_progress()
    typer.echo(" ".join(filter(None, ["interrupted", what_stayed(error)])), err=True)


def _fail(message: str) -> None:
    _end_progress()
    typer.echo(f"coldstill: {message}", err=True)
    raise typer.Exit(USER_ERROR) from None
