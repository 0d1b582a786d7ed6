"""The standard streams of a rank, which reach the user through its launcher."""

from __future__ import annotations

import fcntl
import io
import os
import stat
import struct
import sys
import termios
import time
from typing import Any

from lapse_elmo.errors import OutputError

_LONGEST_S = 2.0


def flush_to_launcher() -> None:
    """Flush stdout and stderr, and wait (at most 2 s) until the reader has drained these pipes.

    A launcher that is told to end the job may kill a rank before it has read what the rank wrote last: of 140 aborts
    right after a message, MPICH's mpirun lost four messages.
    """
    end = time.monotonic() + _LONGEST_S
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
            while _unread_bytes(stream.fileno()) and time.monotonic() < end:
                time.sleep(1e-3)
        # Closed, or not a file (a test's buffer); a RuntimeError if a signal's handler has interrupted a write to it.
        except (OSError, ValueError, RuntimeError):
            continue


def open_standard_streams() -> None:
    """Open /dev/null in place of closed standard streams, and have stdout escape what it cannot encode.

    A file opened later would otherwise get the number of the closed stream. Write errors of stdout do not raise; they
    are kept for :func:`unwritten_output`.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
    file = io.BufferedWriter(_ErrorKeepingFile(1, "w", closefd=False))
    sys.stdout.flush()
    sys.stdout = io.TextIOWrapper(
        file, sys.stdout.encoding, "backslashreplace", line_buffering=os.isatty(1), write_through=False
    )


def unwritten_output() -> str:
    """Flush stdout, and return why some of it could not be written; empty if all was.

    Raises:
        BrokenPipeError: If the reader is gone.
    """
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.problem if isinstance(raw, _ErrorKeepingFile) else ""


def check_output() -> None:
    """Flush stdout, and check that all of it could be written.

    Raises:
        OutputError: If not, because a disk is full for instance.
    """
    if problem := unwritten_output():
        raise OutputError(f"cannot write the standard output: {problem}; redirect it to another place")


class _ErrorKeepingFile(io.FileIO):
    """A file that drops data it cannot write and keeps the reason, where print() would raise at any place."""

    problem = ""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            raise
        except OSError as error:
            self.problem = self.problem or error.strerror or str(error)
            return memoryview(data).nbytes


def _unread_bytes(descriptor: int) -> int:
    """Return how many bytes a pipe holds; 0 for anything else."""
    if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        return 0
    return int(struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, struct.pack("i", 0)))[0])
