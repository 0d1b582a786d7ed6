"""Run another program within a time limit that also holds for one that cannot be killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence

_DIES_S = 1.0  # once it is killed


def output_of(command: Sequence[str], seconds: float) -> str:
    """Run a program and return what it prints; end it with all its children if it takes longer than ``seconds``.

    A program in an uninterruptible wait, as with a broken driver or a file server that is gone, does not die when it is
    killed. It is left alone, where :func:`subprocess.run` would wait for its end.

    Raises:
        OSError: It cannot be started.
        subprocess.CalledProcessError: It fails.
        TimeoutError: It takes too long.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        errors="replace", start_new_session=True,
    )
    try:
        output, messages = process.communicate(timeout=seconds)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_DIES_S)
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise TimeoutError(f"{command[0]} has not finished within {seconds:.0f} s") from None
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output, messages)
    return output


def error_line(error: subprocess.SubprocessError | OSError) -> str:
    """Return the first line of a failed program's messages that tells an error, else the first one or the exit status.

    Compilers say first in which function or file an error is.
    """
    status = getattr(error, "returncode", None)
    output = getattr(error, "stderr", None) or (str(error) if status is None else f"exit status {status}")
    lines = output.strip().splitlines() or [str(error)]
    return next((line for line in lines if "error: " in line or "failed: " in line), lines[0])
