"""The start of MPI: load the library, initialise it, and check that it fits the launcher."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lapse_elmo.cores import crowded
from lapse_elmo.errors import LaunchError, in_one_line
from lapse_elmo.launcher import launcher_rank_and_size
from lapse_elmo.mpich import settle_before_init, settle_before_loading

if TYPE_CHECKING:
    from mpi4py import MPI


def start() -> MPI.Intracomm:
    """Load and initialise the MPI library; the communicator of all ranks.

    :raises LaunchError: where the launcher started several processes but MPI sees a world of one, which is what a
        launcher of another MPI family leads to, or where there is no usable MPI library.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})  # which bin/_venv.py blocked
    settle_before_loading(crowded())
    try:
        import mpi4py

        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"no MPI library can be loaded ({in_one_line(error)}): run 'make setup', which installs one, or load your "
            "site's MPI and name its family in MPI4PY_MPIABI (mpich or openmpi)"
        ).on_every_rank() from None
    expected = launcher_rank_and_size()[1]
    version = MPI.Get_library_version()
    library = version.split("\n")[0].rstrip("\0 ")[:40]
    # MPICH cannot even be initialised below Open MPI's launcher; other mismatches give each process its own world.
    stranger = "MPICH" in library and "OMPI_COMM_WORLD_SIZE" in os.environ and "PMI_RANK" not in os.environ
    if not stranger:
        settle_before_init(version)
        with _quiet():
            _initialise(MPI)
    if stranger or (MPI.COMM_WORLD.size == 1 and expected > 1):
        raise LaunchError(
            f"the launcher started {expected} processes but does not fit the MPI library, {library}, which sees only "
            "one: use the library's own mpirun (.venv/bin/mpirun for the one that make setup installs; with Slurm, "
            "srun --mpi=pmi2), or choose the library with MPI4PY_MPIABI=mpich|openmpi"
        ).on_every_rank()
    return MPI.COMM_WORLD


def _initialise(mpi: Any) -> None:
    """``MPI.Init_thread()``, during which other threads can run.

    It returns once all ranks have come to it. mpi4py's own call holds the interpreter's lock, so that no watchdog could
    notice a rank that never comes.
    """
    import mpi4py

    try:
        library = ctypes.CDLL(mpi.__file__)
        begin, end = library.MPI_Init_thread, library.MPI_Finalize
    except (OSError, AttributeError):  # of a mpi4py that is built in another way
        mpi.Init_thread()
        return
    level = getattr(mpi, f"THREAD_{mpi4py.rc.thread_level.upper()}")
    if begin(None, None, level, ctypes.byref(ctypes.c_int())) != mpi.SUCCESS:
        raise LaunchError("the MPI library cannot be initialised; what it says is above").on_every_rank()
    for comm in (mpi.COMM_WORLD, mpi.COMM_SELF):
        comm.Set_errhandler(mpi.ERRORS_RETURN)  # as mpi4py does, which makes exceptions of them
    atexit.register(lambda: None if mpi.Is_finalized() else end())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without mpi4py's warning about a launcher that does not fit, which :func:`start` reports in one line."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="suspicious MPI execution environment")
        yield
