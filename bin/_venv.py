"""Find the repository and the virtual environment of ``make setup``; every program in ``bin/`` imports this first.

It lets ``bin/train`` work without activating the environment, under ``mpirun`` too: if the running Python lacks torch
or mpi4py and is not that of ``.venv``, the program is restarted with that one. A Python that is too old for lapse_elmo
also runs this file, so it imports nothing of lapse_elmo.
"""

import signal

# The same as in lapse_elmo.program.prepare_process, which an installed lapse-elmo calls, but before the slow imports.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # Ctrl-C ends the program without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
import importlib.util  # noqa: E402 (these take a moment)
import os  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

root = Path(__file__).resolve().parent.parent
python = root / ".venv" / "bin" / "python"
if importlib.util.find_spec("torch") is None or importlib.util.find_spec("mpi4py") is None:
    if python.exists() and Path(sys.prefix).resolve() != (root / ".venv").resolve():
        os.execv(python, [str(python), *sys.argv])
    name = Path(sys.argv[0]).name
    sys.exit(f"{name}: error: torch and mpi4py are not installed for {sys.executable}: run 'make setup' first")

sys.path.insert(0, str(root))
