"""Imported first by every program here: find the repository, and the virtual environment that ``make setup`` made.

So that ``bin/train`` works without activating anything, also below ``mpirun``: where the running Python lacks torch and
is not that of ``.venv``, the program is started again with the one that has it. A Python that is too old for lapse_elmo
gets that far, too, so nothing of lapse_elmo is imported here.
"""

import signal

# As lapse_elmo.program.prepare_process, which also runs in an installed lapse-elmo, but without waiting for imports.
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
