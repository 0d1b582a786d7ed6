"""Signals that ask a program to stop, and the exit statuses of all programs in ``bin/``, on which scripts may rely.

=======  ==============================================================================================================
status   meaning
=======  ==============================================================================================================
0        complete: the epochs, steps or minutes are over, or --patience ended the run
1        a bug, or a rank that was lost; stderr has what is known, with rank and host
2        a mistake that the user can correct; one line on stderr says what
75       (EX_TEMPFAIL of sysexits.h) bin/train saved a checkpoint after SIGTERM, SIGINT or SIGUSR1 and can be resumed:
         the same command with the same --run-dir and ``--resume auto`` (the default) continues from there
76       no rank made progress for ``--stall-minutes``; stderr says which rank is silent and where the others wait. The
         same command resumes from the last checkpoint, as after 75
130      a second SIGINT: stopped at once, nothing was saved (128 + the number of the signal)
=======  ==============================================================================================================

If a rank is killed, the launcher chooses the status; it is neither 0 nor 2 nor 75.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

COMPLETE, FAILED, USER_ERROR, RESUMABLE, STALLED, INTERRUPTED = 0, 1, 2, 75, 76, 130

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SAME_KEY_S = 0.3  # one Ctrl-C may arrive twice: from the terminal, and forwarded by the launcher


class StopSignals:
    """A context in which signals that ask this rank to stop are recorded instead of ending the process.

    Attributes:
        asked: Name of the first signal received, or "".
        at_once: Called on a second SIGINT.
    """

    def __init__(self) -> None:
        self.asked = ""
        self.at_once: Callable[[], object] = lambda: os._exit(INTERRUPTED)
        self._interrupted_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in _STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that is not from Python, as of a library; it cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted_at is None:
                self._interrupted_at = now
            elif now - self._interrupted_at > _SAME_KEY_S:
                self.at_once()
        self.asked = self.asked or signal.Signals(number).name


def ignore_stop_signals() -> None:
    """Ignore signals, in a process that is about to end with a status that they should not change."""
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def catch_interrupts() -> None:
    """Have SIGINT raise KeyboardInterrupt, unless it is ignored; until now bin/_venv.py let it end the program."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def interrupts_end_the_process() -> Iterator[None]:
    """Let SIGINT end the process, as by default in other languages, instead of raising KeyboardInterrupt."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    yield
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, before)
