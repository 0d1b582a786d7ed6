"""Find the repository and the virtual environment of ``make setup``; every program in ``bin/`` imports this first.

It lets ``bin/train`` work without activating the environment, under ``mpirun`` too: if the running Python lacks one of
the packages and is not that of ``.venv``, the program is restarted with that one. The Python of a site's module often
has torch and mpi4py, but not the rest. A Python that is too old for lapse_elmo also runs this file, so it imports
nothing of lapse_elmo.
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

NEEDED = ("torch", "mpi4py", "numpy", "h5py", "tqdm", "requests", "tensorboard", "tomli_w")
root = Path(__file__).resolve().parent.parent
python = root / ".venv" / "bin" / "python"
missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
if missing:
    if python.exists() and Path(sys.prefix).resolve() != (root / ".venv").resolve():
        os.execv(python, [str(python), *sys.argv])
    name = Path(sys.argv[0]).name
    sys.exit(f"{name}: error: {sys.executable} has no {', no '.join(missing)}: run 'make setup' first")

sys.path.insert(0, str(root))
