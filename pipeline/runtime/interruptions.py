"""What becomes of work that is cut off: signals that wait until it is saved, and a true word on what stays of it.

Whoever does the work knows what stays; the command line, which says it, does not. So the word travels as a note on
the exception.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from coldstill.cache.errors import ColdstillError

_SAID = b"\ncoldstill: interrupted: this step is finished and saved first; interrupt once more to end at once\n"


class Terminated(BaseException):
    """SIGTERM, as an exception, so that what is half-made is removed on the way out."""


def raise_terminated(_signal: int, _frame: Any) -> None:
    """Take SIGTERM as Python takes SIGINT."""
    raise Terminated


@contextlib.contextmanager
def what_stays(say: Callable[[], str]) -> Iterator[None]:
    """Note on an interruption, and on what the disk refuses, what stays of the work and how it goes on.

    Args:
        say: Gives the words that follow "interrupted" in a sentence. It is asked when the work is cut off; of several
            around the same work the outermost has the last word.
    """
    try:
        yield
    except (KeyboardInterrupt, Terminated, OSError) as error:
        error.add_note(say())
        raise


def what_stayed(error: BaseException) -> str | None:
    """Return the words that `what_stays` left on an exception; None where nobody knew any."""
    notes = getattr(error, "__notes__", [])
    return notes[-1] if notes else None


class WaitingSignal:
    """The first SIGINT or SIGTERM of a time in which signals wait.

    Attributes:
        number: Which one came; None while none did.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def deliver(self) -> None:
        """Let the signal have the effect that it would have had when it came."""
        if self.number is not None:
            number, self.number = self.number, None
            signal.raise_signal(number)


@contextlib.contextmanager
def signals_wait(*, may_wait: bool = True) -> Iterator[WaitingSignal]:
    """Let the first SIGINT or SIGTERM wait until somebody delivers it, or until this ends; a second one acts at once.

    Only the main thread hears signals; in another one, or where they may not wait, everything stays as it is.
    """
    waiting = WaitingSignal()
    if not may_wait or threading.current_thread() is not threading.main_thread():
        yield waiting
        return
    process = os.getpid()
    heard_by: dict[int, Any] = {}

    def restore() -> None:
        while heard_by:
            signal.signal(*heard_by.popitem())

    def wait(number: int, _frame: Any) -> None:
        restore()
        waiting.number = number
        if os.getpid() == process:  # the processes that read data have inherited this function
            # Not by `print`: whoever is at work may be in the middle of one.
            os.write(2, _SAID)

    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if handler not in (signal.SIG_IGN, None):
            heard_by[number] = handler
            signal.signal(number, wait)
    try:
        yield waiting
    except (ColdstillError, OSError):
        raise  # what is the user's to mend is said before that the user was impatient
    except Exception:
        # A process that reads data may have died of the same interruption.
        waiting.deliver()
        raise
    finally:
        restore()
    waiting.deliver()
