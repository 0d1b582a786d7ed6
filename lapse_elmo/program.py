"""Set-up shared by all programs, and the name by which the user started this one.

The programs are scripts of the repository (``bin/train``) and, once the package is installed, commands of
``lapse-elmo`` (``lapse-elmo train``). Sources and messages use the names in ``bin/``; :func:`as_called` turns them into
those of the command where the user reads them.
"""

from __future__ import annotations

import os
import re
import signal
import sys

COMMAND = "lapse-elmo"
PROGRAMS = ("preprocess", "train", "evaluate", "export", "embed", "score", "nearest", "report")
_PROGRAM = re.compile(r"(?<![\w./-])bin/([a-z]+)\b")


def prepare_process() -> None:
    """Set what torch and MPI read when they are loaded, and handle signals that arrive before that.

    bin/_venv.py handles the signals in the same way, even earlier.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # Ctrl-C ends the program without a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Slurm's warning would end a rank that still imports torch. It stays pending until MPI has been started.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    # OpenMP's threads spin while they wait by default. On cores shared with other ranks or programs, this made a step
    # up to ten times slower (benchmarks/README.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def as_called(text: str) -> str:
    """Return ``text`` with programs named as this process was called: ``bin/train``, or ``lapse-elmo train``."""
    folder, name = os.path.split(sys.argv[0])
    if name != COMMAND and (os.path.basename(folder), name) != ("lapse_elmo", "__main__.py"):
        return text
    return _PROGRAM.sub(lambda match: f"{COMMAND} {match[1]}" if match[1] in PROGRAMS else match[0], text)
