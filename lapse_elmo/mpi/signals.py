"""Signals that ask for an end, and the exit statuses of every program in ``bin/``, for scripts to rely on.

=======  ==============================================================================================================
status   meaning
=======  ==============================================================================================================
0        complete: the epochs, steps or minutes are over, or the patience
1        a failure of ours, or of a rank that was lost; what is known is on stderr, with rank and host
2        something that the user can mend; one line on stderr says what
75       (EX_TEMPFAIL of sysexits.h) bin/train saved a checkpoint after SIGTERM, SIGINT or SIGUSR1 and is to be resumed:
         the same command with the same --run-dir and ``--resume auto`` (the default) goes on from there
76       no rank made progress for ``--stall-minutes``; stderr says which rank is silent and where the others wait. The
         last checkpoint is whole, and the same command resumes from it, as after 75
130      a second SIGINT: stopped at once, nothing saved (128 + the signal's number)
=======  ==============================================================================================================

A rank that is killed ends the job with a status that the launcher chooses, neither 0 nor 2 nor 75.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

COMPLETE, FAILED, USER_ERROR, RESUMABLE, STALLED, INTERRUPTED = 0, 1, 2, 75, 76, 130

_ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SAME_KEY_S = 0.3  # a launcher may pass on a Ctrl-C that the terminal has sent to the ranks already


class StopSignals:
    """While entered, notes the signals that ask this rank for an end, instead of dying of them.

    :ivar asked: name of the first that came, or "".
    :ivar at_once: called by a second SIGINT.
    """

    def __init__(self) -> None:
        self.asked = ""
        self.at_once: Callable[[], object] = lambda: os._exit(INTERRUPTED)
        self._interrupted_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in _ASKING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted_at is None:
                self._interrupted_at = now
            elif now - self._interrupted_at > _SAME_KEY_S:
                self.at_once()
        self.asked = self.asked or signal.Signals(number).name


def ignore_stop_signals() -> None:
    """For a process that is about to end anyway, with a status that a signal should not change."""
    for number in _ASKING:
        signal.signal(number, signal.SIG_IGN)


def catch_interrupts() -> None:
    """Have SIGINT raise KeyboardInterrupt, where it is not ignored; bin/_venv.py let it end the program."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
