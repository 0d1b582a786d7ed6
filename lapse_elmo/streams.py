"""The standard streams of a rank, which reach the user by way of its launcher."""

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

_LONGEST_S = 2.0


def flush_to_launcher() -> None:
    """Flush stdout and stderr, and return once whoever reads these pipes has taken everything, within two seconds.

    A launcher that is told to end the job may kill a rank before it has read what the rank wrote last: of 140 aborts
    right after a message, MPICH's mpirun lost four messages.
    """
    end = time.monotonic() + _LONGEST_S
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
            while _unread_bytes(stream.fileno()) and time.monotonic() < end:
                time.sleep(1e-3)
        except (OSError, ValueError):  # closed, or not a file: a test's buffer
            continue


def open_standard_streams() -> None:
    """Put /dev/null where standard streams are closed, lest the next file that is opened takes their place.

    What cannot be encoded, a file's name for instance, is escaped. Errors of stdout are kept for
    :func:`unwritten_output`.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
    file = io.BufferedWriter(_KeepingFile(1, "w", closefd=False))
    sys.stdout.flush()
    sys.stdout = io.TextIOWrapper(
        file, sys.stdout.encoding, "backslashreplace", line_buffering=os.isatty(1), write_through=False
    )


def unwritten_output() -> str:
    """Flush stdout; return why not all of it could be written, or an empty string.

    :raises BrokenPipeError: if nobody reads it any more.
    """
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.problem if isinstance(raw, _KeepingFile) else ""


class _KeepingFile(io.FileIO):
    """A file that drops what cannot be written, and keeps the reason: print would raise, anywhere, or exit itself."""

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
    """What lies in a pipe; 0 for anything else."""
    if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        return 0
    return int(struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, struct.pack("i", 0)))[0])
