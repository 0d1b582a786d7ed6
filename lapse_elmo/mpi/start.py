"""Load the MPI library, initialise it, and check that it fits the launcher."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import re
import signal
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lapse_elmo.errors import LaunchError, in_one_line
from lapse_elmo.mpi.launcher import launcher_rank_and_size, oversubscribed
from lapse_elmo.mpi.left_files import remove_left_files

if TYPE_CHECKING:
    from mpi4py import MPI

_MPICH_DEVICE = re.compile(r"^MPICH Device:\s*ch4:(.*)", re.MULTILINE)


def start_mpi() -> MPI.Intracomm:
    """Load and initialise the MPI library, and return the communicator of all ranks.

    Raises:
        LaunchError: If there is no usable MPI library; or if the launcher started several processes but MPI sees
            only one, which happens if the launcher belongs to another MPI family.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})  # blocked by bin/_venv.py
    if oversubscribed():  # have MPICH yield the core while it waits inside the library (Init, Finalize); read at load
        os.environ.setdefault("MPIR_CVAR_ENABLE_HEAVY_YIELD", "1")
    expected = launcher_rank_and_size()[1]
    if expected == 1:  # needs no launcher; what a shell of `srun --pty` has open to it, one program alone could use
        os.environ.pop("PMI_FD", None)
    MPI = load_mpi()
    version = MPI.Get_library_version()
    library = version.split("\n")[0].rstrip("\0 ")[:40]
    # MPICH cannot even be initialised under Open MPI's launcher; other mismatches give each process its own world.
    mismatch = "MPICH" in library and "OMPI_COMM_WORLD_SIZE" in os.environ and "PMI_RANK" not in os.environ
    if not mismatch:
        choose_mpich_network(version)
        remove_left_files()
        with _quiet():
            _initialise(MPI)
    if mismatch or (MPI.COMM_WORLD.size == 1 and expected > 1):
        raise LaunchError(
            f"the launcher started {expected} processes, but the MPI library, {library}, does not fit it and sees only "
            "one: use the library's own mpirun (.venv/bin/mpirun for the one that make setup installs; with Slurm, "
            "slurm/train.sbatch finds a launcher that fits), or choose the library with MPI4PY_MPIABI=mpich|openmpi"
        ).on_every_rank()
    return MPI.COMM_WORLD


def load_mpi() -> ModuleType:
    """Load the MPI library and return ``mpi4py.MPI``, without initialising MPI.

    Raises:
        LaunchError: If there is no usable MPI library.
    """
    try:
        import mpi4py

        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"no MPI library can be loaded ({in_one_line(error)}): run 'make setup', which installs one, or load your "
            "site's MPI and name its family in MPI4PY_MPIABI (mpich or openmpi)"
        ).on_every_rank() from None
    return MPI


def choose_mpich_network(version: str) -> None:
    """Have an MPICH that was built for both libfabric and UCX use libfabric, unless the user has chosen.

    MPICH would take UCX. UCX is not made for threads that wait for messages, as the server's managers do. Also, its
    ranks publish their addresses in lines of varying length, up to 1,009 bytes in our tests, while Slurm's pmi2 reads
    1,024 bytes at a time and takes the rest of a longer line for a new request. That is probably why ranks sometimes
    failed to start. libfabric's lines stay below 300 bytes.

    Args:
        version: The result of ``MPI_Get_library_version``.
    """
    device = _MPICH_DEVICE.search(version)
    if device and {"ofi", "ucx"} <= set(re.findall(r"\w+", device[1])):
        os.environ.setdefault("MPIR_CVAR_CH4_NETMOD", "ofi")  # read by MPI_Init


def _initialise(mpi: Any) -> None:
    """Call ``MPI_Init_thread`` with the interpreter's lock released.

    The call returns once all ranks have made it. mpi4py's own ``MPI.Init_thread`` holds the lock meanwhile, so the
    watchdog's thread could not report a rank that never comes.
    """
    import mpi4py

    try:
        library = ctypes.CDLL(mpi.__file__)
        begin, end = library.MPI_Init_thread, library.MPI_Finalize
    except (OSError, AttributeError):  # this build of mpi4py does not export them
        mpi.Init_thread()
        return
    level = getattr(mpi, f"THREAD_{mpi4py.rc.thread_level.upper()}")
    if begin(None, None, level, ctypes.byref(ctypes.c_int())) != mpi.SUCCESS:
        raise LaunchError("the MPI library cannot be initialised; its own message is above").on_every_rank()
    for comm in (mpi.COMM_WORLD, mpi.COMM_SELF):
        comm.Set_errhandler(mpi.ERRORS_RETURN)  # as mpi4py does, which turns errors into exceptions
    atexit.register(lambda: None if mpi.Is_finalized() else end())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress mpi4py's warning about a launcher that does not fit: :func:`start_mpi` reports that itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="suspicious MPI execution environment")
        yield
